"""Sets of the same pictures in the layout of every source, for the tests of sources."""

import io
import json
import pathlib
import tarfile
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.testing import assert_array_equal
from PIL import Image

from scaling_ldm.data import pictures
from scaling_ldm.data.pictures import examples, wire

COUNT = 13


def make_originals():
    """Painted icons with captions that are not ASCII, and labels."""
    source = pictures.open_pictures("icons", count=COUNT)
    found = [source.read(i) for i in range(COUNT)]
    return [
        pictures.Picture(
            image=p.image[i:], caption=f"{p.caption} é{i}", name="", label=i % 3
        )
        for i, p in enumerate(found)
    ]


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def write_folder(root, originals):
    rows = ["file_name,caption,kind"]
    for i, p in enumerate(originals):
        (root / f"sub{i % 2}").mkdir(parents=True, exist_ok=True)
        (root / f"sub{i % 2}/{i:03d}.png").write_bytes(png(p.image))
        rows.append(f'sub{i % 2}/{i:03d}.png,"{p.caption}",{p.label}')
    (root / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return {"label": "kind"}


def write_shards(root, originals):
    for shard in range(2):
        members = []
        for i, p in list(enumerate(originals))[shard * 7 : shard * 7 + 7]:
            members += [
                (f"x/{i:06d}.png", png(p.image)),
                (f"x/{i:06d}.txt", p.caption.encode()),
                (f"x/{i:06d}.cls", str(p.label).encode()),
                (f"x/{i:06d}.embedding.npy", b"not read"),
            ]
        tar(root / f"shard-{shard:05d}.tar", members)
    return {}


def write_records(root, originals):
    examples.write_array_record(root / "set", originals, shards=2)
    return {"label": "label"}


def write_tfds(root, originals, split="train"):
    text = {"pythonClassName": "tensorflow_datasets...Text", "text": {}}
    features = {
        "picture": {"pythonClassName": "tensorflow_datasets...Image", "image": {}},
        "captions": {
            "sequence": {"feature": {"featuresDict": {"features": {"text": text}}}}
        },
        "kind": {"classLabel": {"numClasses": "3"}},
        "score": {"tensor": {"dtype": "float32"}},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "features.json").write_text(
        json.dumps({"featuresDict": {"features": features}})
    )
    (root / "kind.labels.txt").write_text("red_fox\ngrey wolf\nowl\n")
    lengths = [7, len(originals) - 7]
    info = {
        "name": "toy",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(n) for n in lengths],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (root / "dataset_info.json").write_text(json.dumps(info))
    for shard, part in enumerate((originals[:7], originals[7:])):
        path = root / f"toy-{split}.array_record-{shard:05d}-of-00002"
        writer = examples.array_record_module.ArrayRecordWriter(
            str(path), "group_size:1"
        )
        for p in part:
            features = {
                "picture": png(p.image),
                "captions/text": p.caption,
                "kind": p.label,
            }
            writer.write(wire.encode_example(features))
        writer.close()
    return {}


def table(originals):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table(
        {
            "image": pa.array(
                [{"bytes": png(p.image), "path": None} for p in originals], image
            ),
            "text": [[p.caption, "another"] for p in originals],
            "kind": [p.label for p in originals],
        }
    )


def write_parquet(root, originals):
    (root / "data").mkdir(parents=True)
    for shard, part in enumerate((originals[:7], originals[7:])):
        path = root / f"data/train-{shard:05d}-of-00002.parquet"
        pq.write_table(table(part), path, row_group_size=3)
    return {"label": "kind"}


def write_saved(root, originals):
    root.mkdir(parents=True, exist_ok=True)
    names = []
    for shard, part in enumerate((originals[:7], originals[7:])):
        names.append(f"data-{shard:05d}-of-00002.arrow")
        rows = table(part)
        with pa.ipc.new_stream(str(root / names[-1]), rows.schema) as out:
            out.write_table(rows, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names]}
    (root / "state.json").write_text(json.dumps(state))
    (root / "cache-123.arrow").write_bytes(b"an index of datasets.map, not data")
    return {"label": "kind"}


LAYOUTS = {
    "folder": ("image_folder", write_folder),
    "shards": ("webdataset", write_shards),
    "records": ("array_record", write_records),
    "tfds": ("tfds", write_tfds),
    "parquet": ("huggingface", write_parquet),
    "saved": ("huggingface", write_saved),
}


def upload(path):
    """A copy of a local folder in fsspec's memory."""
    fs, base = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for file in pathlib.Path(path).rglob("*"):
        if file.is_file():
            name = file.relative_to(path).as_posix()
            fs.pipe_file(f"{base}/{name}", file.read_bytes())
    return f"memory:/{base}"


def assert_are(found, originals, order):
    assert len(found) == len(order)
    for index, picture in pictures.read_ahead(found, range(len(found)), 3):
        want = originals[order[index]]
        assert not isinstance(picture, pictures.BadRecord), picture
        assert picture.caption == want.caption
        assert_array_equal(picture.image, want.image)
        assert picture.label == want.label
        assert picture.held_out is None
    names = {found.read(i).name for i in range(len(found))}
    assert len(names) == len(order)


def outcomes(found):
    """{last part of the name: caption, or why it is bad}."""
    result = {}
    for _, item in pictures.read_ahead(found, range(len(found)), 2):
        bad = isinstance(item, pictures.BadRecord)
        result[item.name.split("/")[-1]] = item.reason if bad else item.caption
    return result
