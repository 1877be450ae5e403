"""Tables of functions are keyed by the names of config.names, no more and no fewer."""

import inspect

from scaling_ldm.config import names
from scaling_ldm.models import denoisers, from_config, layers


def test_tables_have_the_keys_of_config():
    networks = names.ARCHITECTURES.keys() - {"autoencoder_kl"}
    assert denoisers.CONDITIONING.keys() == networks
    assert from_config._BUILDERS.keys() == networks
    assert tuple(denoisers.DTYPES) == names.DTYPES
    assert tuple(layers.ACTIVATIONS) == names.ACTIVATIONS


def test_the_checks_of_models_know_every_name():
    first = (names.NORMS[0], names.QK_NORMS[0], names.POSITIONS[0])
    fields = list(inspect.signature(layers.check_switches).parameters)
    for i, table in enumerate((names.NORMS, names.QK_NORMS, names.POSITIONS)):
        for name in table:
            layers.check_switches(
                **dict(zip(fields, first, strict=True), **{fields[i]: name})
            )
    assert set(names.QK_NORMS) == {"none", *names.NORMS}
