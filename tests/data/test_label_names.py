"""Names of labels: their file, and the comparison of two sets of them."""

import numpy as np
import pytest
from damages import unsealed

from scaling_ldm import config, records
from scaling_ldm.data import label_names


def test_names_are_read_as_they_were_written(tmp_path):
    path = tmp_path / label_names.FILE
    assert label_names.read(path) == ()
    label_names.write(path, ("cat", "red fox"))
    assert label_names.read(path) == ("cat", "red fox")
    path.write_bytes(unsealed(path.read_bytes()).replace(b"cat", b"dog"))
    with pytest.raises(records.Damaged, match="labels.json does not hold the names"):
        label_names.read(path)


def test_names_of_another_run_are_refused(tmp_path):
    path = tmp_path / label_names.FILE
    label_names.write(path, ("cat",), "ours")
    for of in ("", "ours"):
        assert label_names.read(path, of) == ("cat",)
    with pytest.raises(
        records.Damaged, match=r"another run \(recipe ours; wanted theirs"
    ):
        label_names.read(path, "theirs")
    label_names.write(path, ("cat",))  # as an older version did
    assert label_names.read(path, "theirs") == ("cat",)


def test_labels_of_other_classes_are_refused():
    label_names.refuse_others((), ("cat",), "a run")  # of an older version
    label_names.refuse_others(("cat",), (), "a run")
    label_names.refuse_others(("cat", "dog"), ["cat", "dog"], "a run")
    with pytest.raises(
        config.ConfigError,
        match="a run learnt other classes than these pictures have: 2 there, 2 here; "
        "label 1 is 'dog' there, 'fox' here",
    ):
        label_names.refuse_others(("cat", "dog"), ("cat", "fox"), "a run")


def test_only_what_reads_labels_has_their_names():
    class Source:
        label_names = ("cat",)

    assert label_names.read_by(("label",), Source()) == ("cat",)
    assert label_names.read_by(("text", "mask"), Source()) == ()
    assert label_names.read_by(("label",), object()) == ()


@pytest.mark.parametrize(
    ("classes", "names", "labels", "said"),
    [
        (0, (), [0, -1], None),
        (3, (), [2, 0, 0], None),  # no picture has label 1
        (3, ("cat", "dog", "owl"), [1, 0], None),
        (3, (), [1, 0, 1], "largest label of the pictures is 1; set model.classes = 2"),
        (3, (), [5, 0], "largest label of the pictures is 5; set model.classes = 6"),
        (2, ("cat", "dog"), [2, 0], "pictures is 2; set model.classes = 3"),
        (2, (), [1, -1, 0], "1 of 3 pictures have no label"),
        (2, (), [-1, -1], "the pictures have no labels; set model.classes = 0"),
    ],
)
def test_labels_that_training_would_refuse_are_refused_before(
    classes, names, labels, said
):
    if said is None:
        return label_names.refuse_labels(classes, names, np.array(labels))
    with pytest.raises(config.ConfigError, match=said):
        label_names.refuse_labels(classes, names, np.array(labels))


@pytest.mark.parametrize(
    ("classes", "names", "distinct", "said"),
    [
        (0, ("cat", "dog"), 2, None),
        (2, ("cat", "dog"), 2, None),
        (3, (), 2, None),  # no picture has label 1 or 2
        (3, ("cat", "dog"), 2, "the pictures have 2 labels; set model.classes = 2"),
        (1, (), 2, "the pictures have 2 labels; set model.classes = 2"),
        (3, (), 0, "the pictures have no labels; set model.classes = 0"),
    ],
)
def test_another_number_of_labels_than_the_network_has_is_refused(
    classes, names, distinct, said
):
    if said is None:
        return label_names.refuse_number(classes, names, distinct)
    with pytest.raises(config.ConfigError, match=said):
        label_names.refuse_number(classes, names, distinct)
