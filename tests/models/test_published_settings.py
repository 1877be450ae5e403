"""Every setting of a published config.json is read, refused, or changes nothing."""

import types

import other_settings
import published_configurations as configurations
import pytest

LIKE = types.SimpleNamespace(text_tokens=77, image_shape=(64, 64, 16))


def outcome(name, key):
    """What becomes of another value of a setting: "read", "refused" or "same"."""
    config = configurations.CONFIGURATIONS[name]
    value = other_settings.OTHER[other_settings.kind_of(config)][key]
    assert config.get(key) != value, f"{key} has this value"
    try:
        found = configurations.read(config | {key: value}, LIKE)
    except ValueError:
        return "refused"
    return "same" if found == configurations.read(config, LIKE) else "read"


@pytest.mark.parametrize("name", configurations.CONFIGURATIONS)
def test_no_setting_is_accepted_and_ignored(name):
    config = configurations.CONFIGURATIONS[name]
    kind = other_settings.kind_of(config)
    known = other_settings.OTHER[kind]
    names = {"_class_name", "model_type"}
    assert set(config) - names <= set(known), "a setting that is not tried"
    stored = other_settings.STORED.get(kind, set())
    tried = {
        key: outcome(name, key)
        for key, value in known.items()
        if config.get(key) != value and key not in stored
    }
    same = {key for key, found in tried.items() if found == "same"}
    assert same == set(other_settings.SAME[kind]) & set(tried)
