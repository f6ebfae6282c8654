"""Files changed at random are refused, or read as what they are; nothing else ever happens.

In the suite the same few hundred changes are tried each time, in less than a minute. A soak tries
others, as many as CHEST_FUZZ_EXAMPLES says for each reader; 100,000 take some hours:

    CHEST_FUZZ_EXAMPLES=100000 pytest tests/test_fuzz.py

What it finds goes into tests/corpus.py by name.
"""

import faulthandler
import functools
import gzip
import io
import json
import os
import signal
import tarfile
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import corpus
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT
from test_dicom import GREY as STORED
from test_dicom import make

from chest import predictions
from chest.archives import KINDS, ArchiveError, archive_kind, find_damage, read_contents, unpack
from chest.collections import slice_table, xray_table
from chest.dicom import DicomError, read_ct, read_header
from chest.errors import InputError, ParameterError
from chest.files import read_table
from chest.images import ImageError, read_grey
from chest.labels import LABELS, UNPARSED
from chest.params import Params, load_params
from chest.volumes import VolumeError, cut_axial_slice, to_grey

SOAK = os.environ.get("CHEST_FUZZ_EXAMPLES")
EXAMPLES = int(SOAK or 150)
SIDE = 16
LIMIT = 20  # seconds for an example


def fuzz(share=1.0, **strategies):
    """A test that tries `share` of EXAMPLES, each within LIMIT: machines may be busy."""

    def made(test):
        @functools.wraps(test)
        def in_time(*arguments, **drawn):
            with time_limit():
                test(*arguments, **drawn)

        return settings(
            max_examples=max(1, int(EXAMPLES * share)),
            derandomize=SOAK is None,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(in_time))

    return made


class Late(BaseException):
    """No Exception, of which a reader would make a refusal."""


@contextmanager
def time_limit(seconds=LIMIT):
    """Break off what takes longer, wherever it hangs in Python; where it does not, end all of it.

    Judged afterwards, as Hypothesis does, what hangs would hang for ever.
    """

    def late(*_):
        raise Late(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def thrift():
    """No example takes more than a gibibyte of memory."""
    with corpus.thrifty():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# --- Changes ---------------------------------------------------------------------------------


@st.composite
def changed(draw, seeds, tokens=(b"",), most=4):
    """One of `seeds`, bytes, changed at up to `most` places: turned over, cut, doubled, filled."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 12))
        before, piece, after = (
            content[:place], content[place : place + length], content[place + length :],
        )  # fmt: skip
        filling = st.one_of(st.binary(max_size=12), st.sampled_from(tokens))
        content = draw(
            st.one_of(
                st.just(before),
                st.just(before + after),
                st.just(before + piece * 3 + after),
                filling.map(lambda new, b=before, a=after: b + new + a),
                filling.map(lambda new, b=before, p=piece, a=after: b + new + p + a),
                st.integers(0, 7).map(
                    lambda bit, b=before, p=piece, a=after: b + _turned(p, bit) + a
                ),
            )
        )
    return content


def _turned(piece, bit):
    return bytes([piece[0] ^ 1 << bit]) + piece[1:] if piece else piece


@st.composite
def of_another_bit(draw, seeds):
    """Which of `seeds`, and the same with one bit turned over."""
    seed = draw(st.sampled_from(seeds))
    place = draw(st.integers(0, len(seed) - 1))
    return seed, seed[:place] + _turned(seed[place:], draw(st.integers(0, 7)))


@st.composite
def with_a_field(draw):
    """A NIfTI file of which fields of the header hold any bytes."""
    kind = draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    content = bytearray(corpus.nifti(kind=kind))
    fields = kind.header_class.template_dtype.fields
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        dtype, offset = fields[name][:2]
        size = dtype.itemsize
        content[offset : offset + size] = draw(st.binary(min_size=size, max_size=size))
    return bytes(content)


def test_what_hangs_is_noticed():
    with pytest.raises(Late, match="not done within"), time_limit(0.05):
        time.sleep(60)


def names(error, path):
    """A refusal says of what."""
    assert path.name in str(error)


# --- Volumes, pictures, DICOM ----------------------------------------------------------------

PLAIN = [
    corpus.nifti(),
    corpus.nifti(kind=nib.Nifti2Image),
    corpus.nifti(corpus.VALUES.astype(np.float32)),
    corpus.big_endian(),
    corpus.extended(corpus.nifti()),
]
PACKED = [corpus.packed(content) for content in PLAIN]
PLACES = st.one_of(st.just("center"), st.floats(0, 1))


def judge_volume(path, position="center"):
    """The slice of `path`, which is one if it is not refused; None where it is."""
    try:
        cut = cut_axial_slice(path, position, verify=True)
    except VolumeError as error:
        names(error, path)
        return None
    assert cut.pixels.dtype == np.float64
    assert cut.pixels.ndim == 2
    assert cut.pixels.size
    assert np.isfinite(cut.pixels).all()
    assert 0 <= cut.index < cut.count
    try:
        grey = to_grey(cut.pixels, "minmax")
    except ValueError:
        assert cut.pixels.min() == cut.pixels.max()
    else:
        assert (grey.dtype, grey.min(), grey.max()) == (np.uint8, 0, 255)
    return cut.pixels


@fuzz(2, content=st.one_of(changed(PLAIN), with_a_field()), packed=st.booleans(), position=PLACES)
def test_volumes(folder, content, packed, position):
    path = folder / "a.nii.gz"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    judge_volume(path, position)


@fuzz(content=changed(PACKED))
def test_gzipped_volumes(folder, content):
    path = folder / "a.nii.gz"
    path.write_bytes(content)
    judge_volume(path)


def judge_both(judge, folder, ending, pair):
    """What `judge` finds in files of the two contents of `pair`."""
    files = [folder / f"{name}{ending}" for name in ("whole", "other")]
    for path, content in zip(files, pair, strict=True):
        path.write_bytes(content)
    return [judge(path) for path in files]


@fuzz(2, pair=of_another_bit(PACKED))
def test_no_bit_of_a_gzipped_volume_changes_its_picture(folder, pair):
    whole, other = judge_both(judge_volume, folder, ".nii.gz", pair)
    assert other is None or np.array_equal(other, whole)


PNGS = [
    corpus.plain(),
    corpus.stored(),
    corpus.interlaced(),
    corpus.with_palette(),
    corpus.saved(corpus.Image.fromarray(corpus.GREY.astype(np.uint16) * 257), "PNG"),
]
JPEGS = [corpus.jpeg(), corpus.jpeg(progressive=True), corpus.jpeg(mode="CMYK"), corpus.oriented()]


def judge_picture(path):
    """The picture in `path`, which is one if it is not refused; None where it is."""
    try:
        grey = read_grey(path, SIDE)
    except ImageError as error:
        names(error, path)
        return None
    assert (grey.pixels.dtype, grey.pixels.shape) == (np.uint8, (SIDE, SIDE))
    assert grey.width > 0 < grey.height
    assert len(grey.pixel_hash) == 32
    return grey


@fuzz(2, content=changed([*PNGS, *JPEGS, corpus.several("PNG"), corpus.several("GIF")]))
def test_pictures(folder, content):
    path = folder / "a.png"
    path.write_bytes(content)
    judge_picture(path)


@fuzz(2, pair=of_another_bit(PNGS))
def test_no_bit_of_a_png_changes_its_picture(folder, pair):
    whole, other = judge_both(judge_picture, folder, ".png", pair)
    assert other is None or other.pixel_hash == whole.pixel_hash


@pytest.fixture(scope="module")
def dicom(folder):
    make(STORED).save_as(folder / "whole.dcm", enforce_file_format=True)
    return (folder / "whole.dcm").read_bytes()


@fuzz(data=st.data())
def test_dicom_files(folder, dicom, data):
    path = folder / "a.dcm"
    path.write_bytes(data.draw(changed([dicom])))
    for read in (read_header, read_ct):
        try:
            found = read(path)
        except DicomError as error:
            names(error, path)
        else:
            assert read is read_header or (found.ndim == 2 and np.isfinite(found).all())


# --- Archives --------------------------------------------------------------------------------

MEMBERS = {
    "studies/CT-0/a.nii": corpus.nifti(),
    "b.csv": b"a,b\n1,2\n",
    "c/d e.png": corpus.plain(),
}


def archived(kind):
    """MEMBERS in an archive of this kind."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in MEMBERS.items():
                archive.writestr(name, content)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode=f"w:{kind}") as archive:
        for name, content in MEMBERS.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def judge_archive(path):
    """What `path` unpacks to, {name: bytes}, if it is not refused; None where it is."""
    try:
        contents = read_contents(path)
        if contents.problems or find_damage(path, contents.members):
            return None
        with tempfile.TemporaryDirectory(dir=path.parent) as above:
            into = Path(above) / "into"
            unpack(path, contents.members, "", into)
            files = {file for file in Path(above).rglob("*") if file.is_file()}
            assert all(file.is_relative_to(into) and not file.is_symlink() for file in files)
            assert len(files) == len(contents.members)
            return {str(file.relative_to(into)): file.read_bytes() for file in files}
    except ArchiveError as error:
        names(error, path)
        return None


@fuzz(
    2, content=changed([archived(kind) for kind in ("zip", "", "gz", "bz2", "xz")], [b"../", b"/"])
)
def test_archives(folder, content):
    path = folder / "a.archive"
    path.write_bytes(content)
    if archive_kind(path) in KINDS:
        judge_archive(path)


@fuzz(2, pair=of_another_bit([archived(kind) for kind in ("zip", "gz", "bz2", "xz")]))
def test_no_bit_of_an_archive_changes_a_file(folder, pair):
    whole, other = judge_both(judge_archive, folder, ".archive", pair)
    assert whole == MEMBERS
    assert other is None or sorted(other.values()) == sorted(whole.values())


# --- Tables ----------------------------------------------------------------------------------

SLICES = (
    "index,File name,Patient ID,Country,COVID-19 Infection,Institution,Presentation,study_file\n"
    '0,P001_60.png,\xa0P001,Iran,COVID-19,"Babak Imaging Center, Tehran","fever\ncough",\n'
    "1,16_Morozov_study_0005_10.png,x,Russia,COVID-19,,,/studies/CT-1/study_0005.nii.gz\n"
    "2,14_Jun_case1_60.png,case1,-,COVID-19,-,,\n"
)
RADIOGRAPHS = "id,gender,age,county,ptb,remarks\n1000,f,20,Shenxhen,1,PTB\n1001,m,,Montgomery,0,\n"
MARKS = [b",", b'"', b"\n", b"\r", b"\0", b"=1", b"\xef\xbb\xbf", b"\xff\xfe", b"../", b"\xe9"]


@fuzz(
    2, content=changed([SLICES.encode(), SLICES.encode("iso-8859-1"), SLICES[:300].encode()], MARKS)
)
def test_tables_of_slices(folder, content):
    path, problems = folder / "slices.csv", []
    path.write_bytes(content)
    table = slice_table(path, "COVID-19", problems)
    assert all(problem.file == path for problem in problems)
    assert table is not None or problems
    if table is not None and not problems:
        assert table.index.is_unique
        assert list(table.columns) == ["patient_id", "site", "study"]
        assert table.map(str.isprintable).all(axis=None)
        assert table["patient_id"].str.match(r"ct-.|mosmed-\d{4}$").all()
        assert not table["site"].str.match(r"[=+@]|-.|$").any()


@fuzz(
    2, content=changed([RADIOGRAPHS.encode()], MARKS), labelling=st.sampled_from(["ptb", "remarks"])
)
def test_tables_of_xrays(folder, content, labelling):
    path, problems = folder / "xrays.csv", []
    path.write_bytes(content)
    table = xray_table(path, labelling, problems)
    assert table is not None or problems
    if table is not None and not problems:
        assert table.index.is_unique
        assert table["label"].isin(["normal", "tuberculosis"]).all()
        assert table["site"].isin(["Shenzhen", "Montgomery"]).all()


@fuzz(2, content=changed([b"a,b,c\n1,2,3\n4,5,6\n"], MARKS))
def test_tables_of_the_project(folder, content):
    path = folder / "table.csv"
    path.write_bytes(content)
    try:
        table = read_table(path, ["a", "b", "c"])
    except InputError as error:
        names(error, path)
        return
    assert list(table.columns) == ["a", "b", "c"]
    assert isinstance(table.index, pd.RangeIndex)
    assert all(isinstance(value, str) for value in table.to_numpy().ravel())


# --- Answers ---------------------------------------------------------------------------------

KNOWN = pd.DataFrame(
    {
        "image_id": [f"i{i:02}" for i in range(12)],
        "label": np.resize(LABELS, 12),
        "split": np.resize(["test", "train", "test", "val"], 12),
    }
)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A folder of predictions, and what its file holds."""
    place = tmp_path_factory.mktemp("answered")
    test = KNOWN[KNOWN["split"] == "test"]
    drawn = np.random.default_rng(0).dirichlet([1, 1, 1], len(test))
    table = predictions.tabulate(test, [None, *drawn[1:]])
    predictions.write("s", table, {"weights": "none", "n": len(test)}, place)
    return place, predictions.path_of("s", place).read_bytes()


ANSWERS = [*(label.encode() for label in (*LABELS, UNPARSED)), b"nan", b"0.5", b"1e-6", b"test"]


@fuzz(2, data=st.data())
def test_predictions(answered, data):
    place, whole = answered
    path = predictions.path_of("s", place)
    path.write_bytes(data.draw(changed([whole], [*MARKS, *ANSWERS])))
    try:
        table = predictions.read("s", KNOWN, place)
    except InputError as error:
        names(error, path)
        return
    numbers = table[list(LABELS)].to_numpy()
    assert numbers.dtype == np.float64
    assert np.abs(numbers.sum(axis=1) - 1).max() < 1e-5
    assert ((numbers >= 0) & (numbers <= 1)).all()
    known = KNOWN.set_index("image_id").loc[table["image_id"]]
    assert table["image_id"].is_monotonic_increasing
    assert table["image_id"].is_unique
    assert (known["label"].to_numpy() == table["actual"]).all()
    assert (known["split"].to_numpy() == table["split"]).all()
    assert set(known.index) == set(KNOWN.loc[KNOWN["split"].isin(table["split"]), "image_id"])
    best = np.array(LABELS)[numbers.argmax(axis=1)]
    assert ((table["predicted"] == best) | (table["predicted"] == UNPARSED)).all()


RECORD = {"weights": "none", "by": "site", "n": 3}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["n", "by", "x"]), inner),
    max_leaves=6,
)


@fuzz(content=st.one_of(changed([json.dumps(RECORD).encode()]), JSON.map(json.dumps)))
def test_records(tmp_path_factory, content):
    place = tmp_path_factory.getbasetemp() / "records"
    path = place / predictions.record_path_of("floor_site")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    csv = place / predictions.path_of("floor_site")
    csv.write_text("\n".join([",".join(predictions.COLUMNS), *["a,test,normal,normal,0,1,0"] * 3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        try:
            record = predictions.read_record("floor_site")
        except InputError as error:
            names(error, path)
        else:
            assert (record["n"], record["by"], type(record["weights"])) == (3, "site", str)


@fuzz(2, words=st.lists(st.one_of(st.text(max_size=8), st.sampled_from(
    ["COVID-19", "covid 19", "normal", "abnormal", "Tuberculosis", "not", ".", "_", "\n"]
)), max_size=12))  # fmt: skip
def test_answers_in_words(words):
    from chest.qwen import parse_answer

    names = {"covid19": "COVID-19", "normal": "normal", "tuberculosis": "tuberculosis"}
    said = " ".join(words)
    found = parse_answer(said, names)
    assert found is None or found in LABELS
    letters = "".join(filter(str.isalnum, said)).casefold()
    for label, name in names.items():
        if label == found:
            assert "".join(filter(str.isalnum, name)).casefold() in letters
    alone = [label for label, name in names.items() if name in words]
    if len(alone) > 1:
        assert found is None


# --- Parameters ------------------------------------------------------------------------------

YAML = [b"&a ", b"*a", b"!!int ", b"!!binary ", b"!!set ", b"<<: ", b"? ", b"- ", b"{", b"[", b"~",
        b"\t", b".inf", b"0x", b"1e9", b"'", b'"', b"|\n", b"\n---\n", b"%YAML 1.1\n"]  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return (ROOT / "params.yaml").read_bytes()


def judge_params(path):
    try:
        params = load_params(path)
    except ParameterError as error:
        names(error, path)
        return
    assert isinstance(params, Params)
    assert isinstance(params.seed, int)
    assert params.seed in range(2**32)
    assert abs(params.split.train + params.split.val + params.split.test - 1) < 1e-6


@fuzz(0.7, data=st.data())
def test_parameters(folder, published, data):
    path = folder / "params.yaml"
    path.write_bytes(data.draw(changed([published], YAML, most=3)))
    judge_params(path)


@fuzz(2, content=st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(st.sampled_from(YAML), st.binary(max_size=3))).map(b"".join),
))  # fmt: skip
def test_any_text_as_parameters(folder, content):
    path = folder / "params.yaml"
    path.write_bytes(content)
    judge_params(path)
