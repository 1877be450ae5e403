"""torch's files are read without torch, and nothing in them runs."""

import base64
import io
import os
import pathlib
import pickle
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models.weights import layout, torch_file

# torch.save of {"ema": OrderedDict(a=x.T, b=x[1:, 1:3].bfloat16(), c=Parameter(x[0]))}
# with x = torch.arange(12.0).reshape(3, 4), by torch 2.13 in both of its formats.
SAVED = {
    "zip": (
        "c-o~^%Wl&^6dgNh;<_bGOX&+*3T%P|shu=QLq#73d1E9(5K_e^avis}aN=HP(gISYN~i(0d;sbXux3"
        "er0mPC85-T?F3(VNmwOx`z8Rcf;=$>=W<eodJD6u#~9EVP<G#WvwqZ#J5K37+<n%#P0$x;eE4y`?Q7"
        "tmUa<m(L;7)`S+OV_YzH(UIDr>;AC{jRBD9@y(uh-KColBq&m!#1JL*4o&#T71pX*W0F5uVKB}vYpy"
        "?j)%TXW-UpQTO?E6)FI(Pc-gX5{LuT7honm=0Ov~3w%X9I3}WCPC`gGbu?`F<j1up_;A?{lIENusg&"
        "`NT4rzlFF^-5Omsu?O+{12~2qQ+n631|!a<U5Bfl;zC9k}3ej$s(D!i1Zw!DN?{ZK;mh(6R3DFy)ms"
        "k_KnEYA?EK_u-Pl?8CIjI)mYI6=q+#4_98o)hb+Tx3U!_$rV3w_iR#)Mx|@}#?hePzU+qWG*n#M)}0"
        "pVj4W|}7e&hW{^yq$R6dRFj8mv|%=o)4HPtdVn+?5*Who!A#$T=CJQc9K1K(Lvg6%0_7%lq()}LYBr"
        "v8$p#k15sT9%2irBe<2x4%s$NR>oS4Jot~nu<9=mTvur0FQNVnY^u#7l}O*2P6(jd?kTa$t;qXB_XU"
        "*rB8P^mIP}1Q<RQ|m5Q>IKB4qr<!~jvI_vVj`=RboBCaRz5L)zkeM6Pb`V-`NTKVJK%}1yAe+K1_4d"
        "@=Jr8_2Z;B%E;I5o2_OWA)EA{2_EC@d6m`Jz}ZmV`pCJTDdsMe=dJl+Wh`vAiIZbFNFLna_y~(UEag"
        "GE}UuGdPs#6Uw9aXcQeB!0{0B1B1Gaag-!DL{s6xVNs9Cjq(HsVK~I|CcxtlU=$v7XDS3Ai=oKuM6p"
        "2!hOviHtQf@xJv0=;PQ+2vu~BfawKL%}2f%+eT}4SGZX8)OcGE|4k$r&m_JuxgCph{Chwdc3XYcmyO"
        "L!R0&G&MD0sHx)>H"
    ),
    "plain": (
        "c-nQ6%Wl&^7=?XHLx;44JLMWK3$uxm2oka)L8zM%H?#2uS*|mxja*O8cw7mjO4&3No`FS|JVqadEsu"
        "c2g5NeEkb*U5M)Uj3eCL<Fus*T$$LH<uowr|JZgm&dvu`%d2QXZ}Z5YN}Ni8Fp2Kz$giOgV<!QY@aX"
        "`*#10+G#<FoSjEGb-wLa}ngpdy&IFfaCfND(10N8VzpwHtmv3V~sn$Q{Ex7T{O8<6g9Ilh`kVIM9fq"
        "~nvgkrp=Lsf+0!J_4Ay-Qw(FbZ4B<ptswnOTg-+6(1xoA`NjeL($a1NI{Q*P6b^T_Uf}G*5z*>ETZK"
        "pESuj?X1)88b|_`#^xAB-Q4hoeEShf`IaXkK8Qx1MXTSKQzZx0g80P3|nw`WTmSHZ(RpoT)PHpdAx3"
        "{*8H3ar(nQq_h8$MvwZVA<o6?+#$mGl3;Obi3_xtOI)l8mozSWxKa@!Z2hO}d8ooYp@m|&T8D^N_H`"
        "|;`?+5AbBG(<JjBhKbW5Y-;r3Crx$^;cJ=`mD`aEySUt+~&=Bj=y(QO%jKa0mSO=yr7q+`+v=_|>Y8"
        "b+JcA@!!tuM@|UlSzBpnf?TbT&`#"
    ),
}


def saved(kind):
    return zlib.decompress(base64.b85decode(SAVED[kind]))


def written(tmp_path, data):
    path = tmp_path / "saved.pt"
    path.write_bytes(data)
    return path


def zipped(pickled, storages=(), method=zipfile.ZIP_STORED, deflated=False):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        kind = zipfile.ZIP_DEFLATED if deflated else None
        file.writestr("archive/data.pkl", pickled, kind)
        for key, data in dict(storages).items():
            file.writestr(f"archive/data/{key}", data, method)
    return out.getvalue()


def plain(pickled):
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in header) + pickled


def repacked(change):
    """The saved zip with another pickle."""
    with zipfile.ZipFile(io.BytesIO(saved("zip"))) as file:
        pickled = file.read("archive/data.pkl")
        storages = {
            name.split("/")[-1]: file.read(name)
            for name in file.namelist()
            if "/data/" in name
        }
    return zipped(change(pickled), storages)


@pytest.mark.parametrize("kind", SAVED)
def test_tensors_with_strides_offsets_and_bfloat16(tmp_path, kind):
    path = written(tmp_path, saved(kind))
    tree = torch_file.read(path)
    assert type(tree) is dict and list(tree) == ["ema"]
    tensors = torch_file.load(path)
    x = np.arange(12, dtype="f").reshape(3, 4)
    assert_array_equal(tensors["a"], x.T)
    assert_array_equal(tensors["c"], x[0])
    assert tensors["b"].dtype == ml_dtypes.bfloat16
    assert_array_equal(tensors["b"].astype("f"), x[1:, 1:3])
    assert all(array.flags.c_contiguous for array in tensors.values())


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("pack", [zipped, plain])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_does_not_run(tmp_path, pack, protocol):
    marker = tmp_path / "ran"
    for evil, name in (
        (Evil(os.system, f"touch {marker}"), "posix.system"),
        (Evil(eval, f"open({str(marker)!r}, 'w')"), "builtins.eval"),
        (Evil(getattr, "", "upper"), "builtins.getattr"),
        (Evil(pickle.loads, b""), "pickle.loads"),
    ):
        pickled = pickle.dumps({"weight": evil}, protocol)
        path = written(tmp_path, pack(pickled))
        with pytest.raises(layout.WeightsError) as caught:
            torch_file.read(path)
        wanted = name.replace("builtins", "__builtin__") if protocol < 3 else name
        assert wanted in str(caught.value)
        assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(os.system, f"touch {marker}")))
    assert marker.exists()  # without the check, the pickle runs code


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    rows, more = b"K\x04K\x03\x86", b"K\x04K\x09\x86"  # sizes (4, 3) and (4, 9)
    assert torch_file.read(written(tmp_path, repacked(lambda p: p)))
    path = written(tmp_path, repacked(lambda p: p.replace(rows, more)))
    with pytest.raises(layout.WeightsError, match="exceeds its storage of 12"):
        torch_file.read(path)


# A tensor of 4 rebuilt from a storage of 4, before the pickle's end.
TENSOR = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n"
    b"FloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\0K\x04\x85K\x01\x85"
    b"\x89ccollections\nOrderedDict\n)RtR"
)


def test_memory_is_bounded_by_the_file(tmp_path):
    storage = {"0": np.arange(4, dtype="f").tobytes()}
    wide = TENSOR.replace(b"K\x04\x85K\x01\x85", b"J\0\0\0\x40\x85K\0\x85")
    assert wide != TENSOR  # sizes (2^30,) with strides (0,)
    for pickled, said in (
        (wide, "repeats the 4 values of its storage; save it with .contiguous"),
        (TENSOR.replace(b"K\x04\x85K\x01", b"K\x05\x85K\0"), "repeats the 4 values"),
    ):
        with pytest.raises(layout.WeightsError, match=said):
            torch_file.read(written(tmp_path, zipped(pickled + b".", storage)))
    one = TENSOR.replace(b"K\x04\x85K\x01", b"K\x02\x85K\0")  # sizes (2,) of 4
    path = written(tmp_path, zipped(one + b".", storage))
    assert_array_equal(torch_file.read(path), [0, 0])
    packed = zipped(TENSOR + b".", storage, deflated=True)
    with pytest.raises(layout.WeightsError, match="its data.pkl is compressed"):
        torch_file.read(written(tmp_path, packed))
    # A number for the memo of four bytes; in C it takes 8 GB here.
    memo = b"\x80\x02]r\xff\xff\xff\x1f."
    assert torch_file.read(written(tmp_path, zipped(memo))) == []


def test_what_is_named_many_times_is_read_once(tmp_path):
    storage = {"0": bytes(16)}
    many = b"\x80\x02](" + TENSOR[2:] * 2000 + b"e."
    (first, *others) = torch_file.read(written(tmp_path, zipped(many, storage)))
    assert all(other is first for other in others)
    # Lists of ten times one list, 60 deep: 10^60 tensors.
    laughs = b"\x80\x02](" + TENSOR[2:] + b"e" + b"q\0](" + b"h\0" * 10 + b"e"
    laughs += b"".join(
        b"q" + bytes([n]) + b"](" + (b"h" + bytes([n])) * 10 + b"e"
        for n in range(1, 60)
    )
    tree = torch_file.read(written(tmp_path, zipped(laughs + b".", storage)))
    while isinstance(tree, list):
        tree = tree[-1]
    assert_array_equal(tree, np.zeros(4))


def test_many_views_of_one_storage_are_refused(tmp_path):
    count = 1 << 12  # values; 100 tensors of all but a few of them
    kept = b"J" + count.to_bytes(4, "little")
    views = b""
    for n in range(100):
        size = b"J" + (count - n).to_bytes(4, "little")
        views += (
            TENSOR[2:]
            .replace(b"cpuK\x04t", b"cpu" + kept + b"t")
            .replace(b"K\x04\x85K\x01", size + b"\x85K\x01")
        )
    path = written(
        tmp_path, zipped(b"\x80\x02](" + views + b"e.", {"0": bytes(4 * count)})
    )
    with pytest.raises(layout.WeightsError, match="more than 4 times as large"):
        torch_file.read(path)


def test_fields_set_after_the_fact_are_checked(tmp_path):
    storage = {"0": np.arange(4, dtype="f").tobytes()}
    path = written(tmp_path, zipped(TENSOR + b".", storage))
    assert_array_equal(torch_file.read(path), np.arange(4))
    for field, value in ((b"offset", b"K\x09"), (b"strides", b"K\x09\x85")):
        name = b"X" + len(field).to_bytes(4, "little") + field
        path = written(tmp_path, zipped(TENSOR + b"}" + name + value + b"sb.", storage))
        with pytest.raises(layout.WeightsError, match="exceeds its storage of 4"):
            torch_file.read(path)
    minus = b"}X\x06\0\0\0offsetJ\xfe\xff\xff\xffsb."
    path = written(tmp_path, zipped(TENSOR + minus, storage))
    with pytest.raises(layout.WeightsError, match="are not a tensor's sizes"):
        torch_file.read(path)


def test_what_a_pickle_may_name_cannot_be_altered(tmp_path):
    attack = b"\x80\x02ccollections\nOrderedDict\n}X\x04\0\0\0itemsK\x01sb."
    path = written(tmp_path, zipped(attack))
    with pytest.raises(layout.WeightsError):
        torch_file.read(path)
    slots = b"\x80\x02ccollections\nOrderedDict\nN}X\x04\0\0\0itemsK\x01s\x86b."
    with pytest.raises(layout.WeightsError):
        torch_file.read(written(tmp_path, zipped(slots)))


# {"model": {}, "ema": ..., "opt": {}, "args": Namespace(model="DiT-S/2")}, as DiT's
# authors save it.
TRAINING = (b"\x80\x02}(X\x05\0\0\0model}X\x03\0\0\0ema}X\x01\0\0\0x" + TENSOR[2:]) + (
    b"sX\x03\0\0\0opt}X\x04\0\0\0argscargparse\nNamespace\n)\x81}"
    b"X\x05\0\0\0modelX\x07\0\0\0DiT-S/2sbu."
)


def test_the_average_of_a_training_checkpoint_is_read_and_named(tmp_path):
    storage = {"0": np.arange(4, dtype="f").tobytes()}
    path = written(tmp_path, zipped(TRAINING, storage))
    assert torch_file.read(path)["args"] == {"model": "DiT-S/2"}
    found = torch_file.state_dict(path)
    assert (found.key, found.others) == ("ema", ("model",))
    assert_array_equal(found.tensors["x"], np.arange(4))
    assert torch_file.state_dict(path, "model").others == ("ema",)


def test_one_state_dict_beside_an_optimizer_is_the_one(tmp_path):
    data = pickle.dumps({"state_dict": {}, "optimizer": {"lr": 1.0}, "step": 3}, 2)
    found = torch_file.state_dict(written(tmp_path, zipped(data)))
    assert (found.key, found.others) == ("state_dict", ())


def test_arguments_are_an_inert_class(tmp_path):
    name = b"\x80\x02cargparse\nNamespace\n"
    for attack in (b"}X\x01\0\0\0xK\x01sb.", b"N}X\x01\0\0\0xK\x01s\x86b."):
        with pytest.raises(layout.WeightsError):
            torch_file.read(written(tmp_path, zipped(name + attack)))
    assert not hasattr(torch_file._Namespace, "x")


def test_what_is_refused_says_how_to_save_the_tensors(tmp_path):
    data = pickle.dumps({"ema": {}, "args": pathlib.PurePosixPath("a")}, 2)
    with pytest.raises(
        layout.WeightsError, match=r"PurePosixPath.*\['ema'\], NEW_FILE"
    ):
        torch_file.read(written(tmp_path, zipped(data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no such thing", "cannot be read as a torch file"),
        (saved("plain")[:-20], "bytes, not 8 x 2|bytes, not|is not of"),
        (pickle.dumps(3), "neither torch's zip nor its older format"),
        (zipped(TENSOR + b"."), "storage 0 is missing"),
        (zipped(TENSOR + b".", {"0": b"abc"}), "has 3 bytes, not 4 x 4"),
        (
            zipped(TENSOR + b".", {"0": bytes(16)}, zipfile.ZIP_DEFLATED),
            "storage 0 is compressed",
        ),
        (zipped(TENSOR + b".").replace(b"data.pkl", b"late.pkl"), "has no data.pkl"),
    ],
)
def test_damaged_files_are_refused(tmp_path, data, message):
    with pytest.raises(layout.WeightsError, match=message):
        torch_file.read(written(tmp_path, data))


def test_which_state_dict(tmp_path):
    one = pickle.dumps({"model": {}, "ema": {}}, 2)
    assert torch_file.load(written(tmp_path, zipped(one))) == {}
    two = pickle.dumps({"model": {"step": 1}, "other": {}}, 2)
    path = written(tmp_path, zipped(two))
    assert torch_file.load(path, "other") == {}
    with pytest.raises(layout.WeightsError, match="it has ..model., .other.."):
        torch_file.load(path)
    with pytest.raises(layout.WeightsError, match="no state dict 'ema'"):
        torch_file.load(path, "ema")
    with pytest.raises(layout.WeightsError, match="'step'. are not tensors"):
        torch_file.load(path, "model")
    with pytest.raises(layout.WeightsError, match="no such file"):
        torch_file.load(tmp_path / "none.pt")
