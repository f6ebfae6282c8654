"""Bad and odd files of every kind, drawn from code, and what must happen to each.

A case is either read, and then gives what it should, or refused by a message that holds certain
words. tests/test_corpus.py runs all of them; tests/test_fuzz.py looks for more, and what it finds
is written down here for good. docs/bad-input.md is this file as a table:

    python tests/corpus.py > docs/bad-input.md
"""

import gzip
import io
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Case:
    """One kind of input: ``make`` writes it, and it is refused with the words ``told``, or read.

    ``gives`` is what reading it gives (of a picture: its grey values, or its size alone); ``note``
    says so in words. ``slack``: by how much a grey value may differ, where a codec rounds.
    ``name``: of the file; of a collection: that the message must hold.
    """

    kind: str
    make: Callable[[Path], None]
    told: str = ""
    gives: object = None
    note: str = ""
    slack: int = 0
    name: str = ""


GIBIBYTE = 2**30


def resident(key: str) -> int:
    """What /proc says of this process's memory, bytes: VmRSS is what it has, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@contextmanager
def thrifty(most: int = GIBIBYTE) -> Iterator[None]:
    """Fail where this process meanwhile takes more than `most` bytes beside what it has now.

    Systems without Linux's /proc do not tell, and pass.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        yield
        return
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < most


# --- Volumes ---------------------------------------------------------------------------------

VALUES = np.random.default_rng(0).integers(-1000, 400, (9, 8, 7)).astype(np.int16)


def shown(values: np.ndarray) -> np.ndarray:
    """The centre slice of RAS+ values as it is displayed: front up, the patient's right on left."""
    return values[::-1, ::-1, values.shape[2] // 2].T.astype(np.float64)


def nifti(
    values: np.ndarray = VALUES, affine: object = None, kind: type = nib.Nifti1Image, **fields
) -> bytes:
    """A whole .nii file; `fields` of its header are overwritten whatever they then mean."""
    affine = np.eye(4) if affine is None else affine
    content = bytearray(kind(values, affine, dtype=values.dtype).to_bytes())
    types = kind.header_class.template_dtype.fields
    for field, value in fields.items():
        dtype, offset = types[field][:2]
        new = np.array(value, dtype.base).tobytes()
        content[offset : offset + len(new)] = new
    return bytes(content)


def packed(content: bytes, **how) -> bytes:
    return gzip.compress(content, mtime=0, **how)


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def flipped(content: bytes, place: int) -> bytes:
    """`content` with one bit of the byte at `place` turned over."""
    changed = bytearray(content)
    changed[place] ^= 16
    return bytes(changed)


def with_value(value: float, index: int) -> np.ndarray:
    values = VALUES.astype(np.float32)
    values[4, 4, index] = value
    return values


def turned(degrees: float) -> np.ndarray:
    """An affine turned about the axis from left to right."""
    sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
    return affine


def zeros_behind(content: bytes, mebibytes: int) -> bytes:
    """`content` and that many MiB of zeros, gzipped in pieces: a thousandth of that in the file."""
    return packed(content) + packed(bytes(2**24)) * (mebibytes // 16)


def extended(content: bytes) -> bytes:
    """The same volume with a header extension of 32 bytes: comments, as dcm2niix may write."""
    grown = content[:348] + b"\1\0\0\0" + struct.pack("<ii", 32, 6) + bytes(24) + content[352:]
    at = nib.Nifti1Header.template_dtype.fields["vox_offset"][1]
    return grown[:at] + struct.pack("<f", 384) + grown[at + 4 :]


def big_endian() -> bytes:
    header = nib.Nifti1Header(endianness=">")
    return nib.Nifti1Image(VALUES, np.eye(4), header, dtype=VALUES.dtype).to_bytes()


RGB = np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"])
WHOLE = packed(nifti())
SCALED = nifti(scl_slope=2, scl_inter=-1024)


def volume(kind: str, content: bytes, told: str = "", name: str = "a.nii.gz", **more) -> Case:
    gives = None if told else more.pop("gives", shown(VALUES))
    return Case(kind, written(content), told, gives, more.pop("note", ""), name=name)


VOLUMES = [
    volume("gzip, cut off within its header", WHOLE[:8], "ended before the end-of-stream marker"),
    volume("gzip, cut off within the NIfTI header", WHOLE[:120], "ended before the end-of-stream"),
    volume("gzip, cut off within the values", WHOLE[: len(WHOLE) // 2], "ended before the end"),
    volume("gzip, cut off within its checksum", WHOLE[:-5], "ended before the end"),
    volume("gzip, a flipped bit in its header", flipped(WHOLE, 2), "no readable volume"),
    volume("gzip, a flipped bit in the values", flipped(WHOLE, -100), "CRC check failed"),
    volume("gzip, a wrong checksum", flipped(WHOLE, -6), "CRC check failed"),
    volume("gzip, a wrong length at its end", flipped(WHOLE, -1), "Incorrect length"),
    volume("gzip, garbage behind its end", WHOLE + b"garbage" * 9, "Not a gzipped file"),
    volume("gzip, zeros behind its end", WHOLE + bytes(512), note="as tape blocks pad it"),
    volume("gzip of several members", packed(nifti()[:700]) + packed(nifti()[700:])),
    volume("gzip of no bytes", packed(b""), "no readable volume"),
    volume("gzip of a gzip", packed(WHOLE), "no readable volume"),
    volume("gzipped NIfTI named .nii", WHOLE, name="a.nii", note="by content, not by name"),
    volume("plain NIfTI named .nii.gz", nifti(), note="by content, not by name"),
    volume("an upper-case ending", WHOLE, name="A.NII.GZ"),
    volume("no byte at all", b"", "no readable volume"),
    volume("text", b"<html>404 not found</html>" * 99, "no readable volume", "a.nii"),
    volume("a wrong magic", nifti(magic=b"nope"), "no readable volume", "a.nii"),
    volume("an Analyze 7.5 header: no magic", nifti(magic=b""), "no readable volume", "a.nii"),
    volume("the header of a pair (.hdr, .img)", nifti(magic=b"ni1", vox_offset=0),
           "values inside the header", "a.nii"),
    volume("a wrong header length", nifti(sizeof_hdr=349), name="a.nii", note="the magic counts"),
    volume("a dimension of 0", nifti(dim=[3, 9, 0, 7, 1, 1, 1, 1]), "shape 9x0x7", "a.nii"),
    volume("a negative dimension", nifti(dim=[3, 9, -8, 7, 1, 1, 1, 1]), "shape 9x-8x7", "a.nii"),
    volume("huge dimensions", nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "damaged data",
           "a.nii"),
    volume("more dimensions than there are", nifti(dim=[99, 9, 8, 7, 1, 1, 1, 1]),
           "no readable volume", "a.nii"),
    volume("two dimensions", nifti(VALUES[..., 0]), "shape 9x8"),
    volume("four dimensions, one time point", nifti(VALUES[..., None]), note="as three"),
    volume("four dimensions, several time points", nifti(np.stack([VALUES, VALUES], 3)),
           "shape 9x8x7x2"),
    volume("NaN in the slice", nifti(with_value(np.nan, 3)), "NaN or infinity in slice 3"),
    volume("infinity in the slice", nifti(with_value(np.inf, 3)), "NaN or infinity in slice 3"),
    volume("NaN outside the slice", nifti(with_value(np.nan, 2)), note="the slice is whole"),
    volume("a scale", SCALED, gives=2 * shown(VALUES) - 1024),
    volume("a scale of 0", nifti(scl_slope=0, scl_inter=0), note="unscaled, as the standard says"),
    volume("a scale of NaN", nifti(scl_slope=np.nan), note="unscaled"),
    volume("an intercept of NaN", nifti(scl_slope=1, scl_inter=np.nan), "damaged data"),
    volume("a scale beyond all numbers", nifti(VALUES.astype(float), scl_slope=3e38, scl_inter=0),
           gives=shown(VALUES) * float(np.float32(3e38))),
    volume("a singular affine", nifti(sform_code=2, srow_x=[0, 0, 0, 0]), "names no axes"),
    volume("an affine of NaN", nifti(sform_code=2, srow_x=[np.nan, 0, 0, 0]), "names no axes"),
    volume("an oblique affine", nifti(affine=turned(20)), note="along the nearest axes"),
    volume("no orientation at all", nifti(sform_code=0, qform_code=0),
           gives=shown(VALUES[::-1]), note="as the standard says: first axis to the left"),
    volume("big-endian values", big_endian()),
    volume("NIfTI-2", nifti(kind=nib.Nifti2Image)),
    volume("a header extension", extended(nifti())),
    volume("colours", nifti(RGB), "values of type"),
    volume("complex numbers", nifti(VALUES.astype(np.complex64)), "values of type complex64"),
    volume("an unknown type of values", nifti(datatype=999), "no readable volume"),
    volume("values that begin beyond the end", nifti(vox_offset=1e6), "damaged data", "a.nii"),
    volume("values that begin inside the header", nifti(vox_offset=16), "vox offset", "a.nii"),
    volume("values that begin before the file", nifti(vox_offset=-352), "vox offset", "a.nii"),
    volume("values that begin nowhere (NaN)", nifti(vox_offset=np.nan), "no readable volume",
           "a.nii"),
    volume("a plain file, cut off", nifti()[:-1], "damaged data", "a.nii"),
    volume("a slice of 30,000 x 30,000 px in a megabyte",
           zeros_behind(nifti(np.zeros((1, 1, 1), np.uint8),
                              dim=[3, 30000, 30000, 1, 1, 1, 1, 1]), 864), "30000 x 30000"),
    volume("a small volume, then 1 GiB of zeros", zeros_behind(nifti(), 1024),
           note="nothing behind the values is kept"),
    Case("a folder in its place", Path.mkdir, "no readable volume", name="a.nii"),
    Case("nothing", lambda path: None, "no such file", name="a.nii"),
]  # fmt: skip


# --- Pictures --------------------------------------------------------------------------------

GREY = np.random.default_rng(1).integers(0, 256, (40, 60)).astype(np.uint8)
DARK = np.pad(GREY[:-1], ((0, 1), (0, 0)))
SMOOTH = np.add.outer(np.arange(40), np.arange(60) * 2).astype(np.uint8)  # what JPEG can hold
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # column, row and steps of each pass  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, data: bytes, *, depth=8, colour=0, interlaced=0, extra=b""
) -> bytes:
    """A PNG file: `data` are its scan lines, packed; `extra` chunks stand before them."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", head), extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(parts)


def lines(grey: np.ndarray) -> bytes:
    """The scan lines of 8-bit grey, none of them filtered."""
    return b"".join(b"\0" + row.tobytes() for row in grey)


def plain(**how) -> bytes:
    return png(60, 40, zlib.compress(lines(GREY)), **how)


def interlaced(lacking: int = 0) -> bytes:
    """GREY in seven passes, of which the last lacks so many lines."""
    passes = b"".join(lines(GREY[y::dy, x::dx]) for x, y, dx, dy in ADAM7)
    return png(60, 40, zlib.compress(passes[: len(passes) - lacking * 61]), interlaced=1)


def stored() -> bytes:
    """GREY in a PNG that is not compressed: a changed byte of it still decodes."""
    return png(60, 40, zlib.compress(lines(GREY), 0))


def saved(picture: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def jpeg(grey: np.ndarray = SMOOTH, mode: str = "L", **how) -> bytes:
    return saved(Image.fromarray(grey).convert(mode), "JPEG", quality=95, **how)


def with_palette() -> bytes:
    """Two colours of a palette, of which the first is transparent."""
    picture = Image.fromarray((GREY > 127).astype(np.uint8))
    picture.putpalette([200, 200, 200, 100, 100, 100])
    return saved(picture, "PNG", transparency=0)


def several(form: str) -> bytes:
    frames = [Image.fromarray(grey) for grey in (GREY, 255 - GREY)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:])


def oriented() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return jpeg(exif=exif)


def zeroed(content: bytes, count: int, kept: int = 0) -> bytes:
    """`content` with its last `count` bytes 0, but for the `kept` at its end.

    So a download ends that was cut off, or lost a piece, where its file had its full length.
    """
    return content[:-count] + bytes(count - kept) + content[len(content) - kept :]


def with_thumbnail(grey: np.ndarray = SMOOTH) -> bytes:
    """A JPEG that holds another whole one among its metadata, as cameras write it."""
    return jpeg(grey, exif=b"Exif\0\0" + jpeg())


def with_early_end() -> bytes:
    return jpeg()[:-200] + b"\xff\xd9" + jpeg()[-198:]


def empty_rows(side: int, pixel: int, **how) -> bytes:
    """A PNG of `side` x `side` px, of `pixel` bytes each, all 0 but for the last: a few kilobytes.

    Blocks of 100 rows that do not refer to each other are packed once and repeated.
    """
    row = bytes(1 + side * pixel)
    last = row * 99 + row[:-pixel] + b"\xff" * pixel
    blocks = (side // 100 - 1) * [row * 100] + [last]
    packer = zlib.compressobj(9, wbits=-15)
    one, other = (packer.compress(b) + packer.flush(zlib.Z_FULL_FLUSH) for b in blocks[-2:])
    check = 1
    for block in blocks:
        check = zlib.adler32(block, check)
    data = b"\x78\xda" + one * (len(blocks) - 1) + other + packer.flush()
    return png(side, side, data + struct.pack(">I", check), **how)


def swollen(kind: bytes, before: bytes) -> bytes:
    """A chunk that unpacks to 32 MiB."""
    return chunk(kind, before + zlib.compress(bytes(2**25)))


def picture(kind: str, content: bytes, told: str = "", name: str = "a.png", **more) -> Case:
    gives = None if told else more.pop("gives", GREY)
    return Case(kind, written(content), told, gives, name=name, **more)


OFF = "no readable picture"
LAST = len(stored()) - 100  # a byte of the last line of pixels
PICTURES = [
    picture("PNG, 8-bit grey", plain()),
    picture("PNG, cut off", plain()[:1000], OFF),
    picture("PNG, cut off before its end mark", plain()[:-12], note="its pixels are whole"),
    picture("PNG, a flipped bit in its pixels", flipped(stored(), LAST), OFF),
    picture("PNG, a wrong checksum of a piece", flipped(plain(), -13),
            note="the one that the pixels have of their own is right"),
    picture("PNG, a wrong checksum of its pixels", flipped(plain(), -17), OFF),
    picture("PNG, a wrong checksum of its header", flipped(plain(), 30), OFF),
    picture("PNG, fewer lines than its header says, all checksums right",
            png(60, 41, zlib.compress(lines(GREY))), "of 2,501 bytes"),
    picture("PNG, interlaced, less than its header says, all checksums right",
            interlaced(lacking=3), "of 2,475 bytes"),
    picture("PNG, a black last line", png(60, 40, zlib.compress(lines(DARK))), gives=DARK,
            note="the line is there"),
    picture("PNG, 1 bit, a black last line", saved(Image.fromarray(DARK > 127), "PNG"),
            gives=np.where(DARK > 127, 255, 0).astype(np.uint8)),
    picture("PNG, bytes behind its end", plain() + b"garbage", note="nothing behind it is read"),
    picture("PNG, 1 bit", saved(Image.fromarray(GREY > 127), "PNG"),
            gives=np.where(GREY > 127, 255, 0).astype(np.uint8)),
    picture("PNG, 16 bits", saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
            note="by their full range"),
    picture("PNG, interlaced", interlaced()),
    picture("PNG, a palette with transparency", with_palette(),
            gives=np.where(GREY > 127, 100, 0).astype(np.uint8), note="on black"),
    picture("PNG, colours", saved(Image.fromarray(GREY).convert("RGB"), "PNG"), note="luminance"),
    picture("PNG, animated", several("PNG"), "2 frames"),
    picture("PNG, a text that unpacks to 32 MiB", plain(extra=swollen(b"zTXt", b"a\0\0")), OFF),
    picture("PNG, a colour profile that unpacks to 32 MiB",
            plain(extra=swollen(b"iCCP", b"a\0\0")), OFF),
    picture("PNG, 100,000 x 100,000 px in 70 bytes", png(100_000, 100_000, b"x"),
            "exceeds limit"),
    picture("PNG, 0 px", png(0, 0, zlib.compress(b"")), OFF),
    picture("PNG, 1 px", png(1, 1, zlib.compress(b"\0\7")), "one grey value"),
    picture("PNG, one grey value", png(60, 40, zlib.compress(lines(GREY * 0 + 7))),
            "one grey value"),
    picture("PNG, 8,000 x 8,000 px of 16 bits", empty_rows(8000, 2, depth=16), gives=(8000, 8000)),
    picture("PNG, 8,000 x 8,000 px of four channels", empty_rows(8000, 4, colour=6),
            gives=(8000, 8000)),
    picture("JPEG", jpeg(), gives=SMOOTH, slack=4, name="a.jpg"),
    picture("JPEG named .png", jpeg(), gives=SMOOTH, slack=4, note="by content, not by name"),
    picture("PNG named .jpg", plain(), name="a.jpg", note="by content, not by name"),
    picture("JPEG, progressive", jpeg(progressive=True), gives=SMOOTH, slack=4),
    picture("JPEG, cut off", jpeg()[:-200], OFF),
    picture("JPEG, cut off, then zeros up to its length", zeroed(jpeg(GREY), 1500), "no end mark"),
    picture("JPEG, progressive, cut off, then zeros", zeroed(jpeg(GREY, progressive=True), 1500),
            OFF),
    picture("JPEG with a thumbnail, cut off, then zeros", zeroed(with_thumbnail(GREY), 1500),
            "no end mark"),
    picture("JPEG with a thumbnail", with_thumbnail(), gives=SMOOTH, slack=4),
    picture("JPEG, bytes behind its end", jpeg() + b"\xff\xda\0", gives=SMOOTH, slack=4,
            note="nothing behind it is read"),
    picture("JPEG, an end mark too early", with_early_end(), gives=(60, 40),
            note="what is missing is grey; it cannot be noticed"),
    picture("JPEG, zeros in the middle of its pixels", zeroed(jpeg(), 100, 50), gives=(60, 40),
            note="it cannot be noticed"),
    picture("JPEG, colours", jpeg(mode="RGB"), gives=SMOOTH, slack=4, note="luminance"),
    picture("JPEG, CMYK", jpeg(mode="CMYK"), gives=SMOOTH, slack=6, note="luminance"),
    picture("JPEG, to be turned (EXIF)", oriented(), gives=np.rot90(SMOOTH, -1), slack=4,
            note="turned"),
    picture("GIF named .png", several("GIF"), OFF),
    picture("BMP named .png", saved(Image.fromarray(GREY), "BMP"), OFF),
    picture("text named .png", b"<html>404 not found</html>", OFF),
    picture("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", OFF),
    picture("no byte at all", b"", OFF),
    Case("a folder named x.png", Path.mkdir, OFF, name="x.png"),
    Case("nothing", lambda path: None, "no such file", name="a.png"),
]  # fmt: skip


# --- Collections -----------------------------------------------------------------------------

CT = Path("large-covid19-ct-slice-dataset")
COVID = CT / "curated_data" / "curated_data" / "2COVID"
COVID_TABLE, NORMAL_TABLE = CT / "meta_data_covid.csv", CT / "meta_data_normal.csv"
STUDIES = Path("COVID19_1110") / "studies"
XRAYS = Path("chest-x-ray-lungs-segmentation")
XRAY = XRAYS / "Chest-X-Ray" / "Chest-X-Ray" / "image"
XRAY_TABLE = XRAYS / "MetaData.csv"
SLICE = "P001_60.png"  # one of COVID


def edited(table: Path, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(raw: Path) -> None:
        content = (raw / table).read_bytes()
        assert change(content) != content
        (raw / table).write_bytes(change(content))

    return make


def replaced(table: Path, old: str, new: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    return edited(table, lambda content: content.replace(old.encode(), new.encode(encoding), 1))


def renamed(new: str, row: str | None = None) -> Callable[[Path], None]:
    """SLICE under another name, and its row too, under that name or `row`."""

    def make(raw: Path) -> None:
        (raw / COVID / SLICE).rename(raw / COVID / new)
        quoted = (row or new).replace('"', '""')
        replaced(COVID_TABLE, SLICE, f'"{quoted}"', "iso-8859-1")(raw)

    return make


def beside(name: str | bytes, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """One more entry in the folder of X-rays."""
    return lambda raw: make(
        Path(os.fsdecode(os.path.join(os.fsencode(raw / XRAY), os.fsencode(name))))
    )


def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Something else in the place of SLICE."""

    def swap(raw: Path) -> None:
        (raw / COVID / SLICE).unlink()
        make(raw / COVID / SLICE)

    return swap


def unreadable(place: Path) -> Callable[[Path], None]:
    """A file that its owner may not read; OSError where that cannot be, as for root."""

    def make(raw: Path) -> None:
        (raw / place).chmod(0)
        if os.access(raw / place, os.R_OK):
            raise OSError("whoever runs this may read every file")

    return make


def moved(place: Path) -> Callable[[Path], None]:
    """`place` lies in a store elsewhere, and a link stands for it."""

    def make(raw: Path) -> None:
        store = raw.parent.parent / "store"
        store.mkdir()
        (raw / place).rename(store / "kept")
        (raw / place).symlink_to(store / "kept")

    return make


def every_link(raw: Path) -> None:
    """All X-rays are links into a store, as annexes and data versioning make them."""
    store = raw.parent.parent / "store"
    store.mkdir()
    for path in (raw / XRAY).iterdir():
        path.rename(store / path.name)
        path.symlink_to(store / path.name)


def tree(kind: str, make: Callable[[Path], None], told: str = "", name: str = "", **more) -> Case:
    return Case(kind, make, told, name=name, **more)


NFC, NFD = (unicodedata.normalize(form, "Málaga_60.png") for form in ("NFC", "NFD"))
CSV = COVID_TABLE.name
ROW = b"\n1001,"
TREES = [
    tree("as published", lambda raw: None),
    tree("csv with a byte-order mark", edited(XRAY_TABLE, lambda c: b"\xef\xbb\xbf" + c)),
    tree("csv with Windows line ends", edited(XRAY_TABLE, lambda c: c.replace(b"\n", b"\r\n"))),
    tree("csv with blank lines", edited(XRAY_TABLE, lambda c: c.replace(b"\n", b"\n\n"))),
    tree("csv in UTF-16", edited(XRAY_TABLE, lambda c: c.decode().encode("utf-16")),
         "is no UTF-8", XRAY_TABLE.name),
    tree("csv in ISO-8859-1, the one that is published so", replaced(COVID_TABLE, "Iran,", "Irán,",
         "iso-8859-1")),
    tree("csv in ISO-8859-1, another one", replaced(NORMAL_TABLE, "Iran,", "Irán,", "iso-8859-1"),
         "line 2: the byte 0xe1 is no UTF-8", NORMAL_TABLE.name),
    tree("csv in Windows-1251", replaced(NORMAL_TABLE, "Iran,", "Москва,", "cp1251"),
         "line 2: the byte 0xcc is no UTF-8", NORMAL_TABLE.name),
    tree("csv in UTF-8, a single byte in ISO-8859-1", edited(COVID_TABLE, lambda c: c.replace(
         b"Iran,", "Irán,".encode(), 1).replace(b"Iran,", b"Ir\xe1n,", 1)),
         "is no UTF-8", CSV),
    tree("csv in Windows-1252: control characters", replaced(COVID_TABLE, "Iran,", "\x93Iran,",
         "iso-8859-1"), "Country is", CSV),
    tree("csv, a line end within free text", replaced(XRAY_TABLE, "bilateral PTB",
         '"bilateral\nPTB"')),
    tree("csv, a line end within a name", renamed("P001\n60.png"), "printable text", CSV),
    tree("csv, an empty file", edited(XRAY_TABLE, lambda c: b""), "an empty file", XRAY_TABLE.name),
    tree("csv, a head alone", edited(XRAY_TABLE, lambda c: c.split(b"\n")[0]), "no row",
         XRAY_TABLE.name),
    tree("csv, a missing column", replaced(XRAY_TABLE, "ptb", "tb"), "no column ptb",
         XRAY_TABLE.name),
    tree("csv, a doubled column", replaced(XRAY_TABLE, "age", "ptb"), "the column ptb twice",
         XRAY_TABLE.name),
    tree("csv, another separator", edited(XRAY_TABLE, lambda c: c.replace(b",", b";")),
         "no column id", XRAY_TABLE.name),
    tree("csv, a row too short", replaced(XRAY_TABLE, "\n1000,female", "\n1000"),
         "more or fewer fields", XRAY_TABLE.name),
    tree("csv, a row too long", replaced(XRAY_TABLE, "Shenxhen", "Shenxhen,Shenxhen"),
         "more or fewer fields", XRAY_TABLE.name),
    tree("csv, all rows too long", edited(XRAY_TABLE, lambda c: c.replace(b"\n1", b"\n,1")),
         "more or fewer fields", XRAY_TABLE.name),
    tree("csv, an id twice", replaced(XRAY_TABLE, "\n1001,", "\n1000,"), "1000 in 2 rows",
         XRAY_TABLE.name),
    tree("csv, an id that leaves the folder", replaced(XRAY_TABLE, "\n1000,", "\n../../1000,"),
         "a row for ../../1000, but no such image", XRAY_TABLE.name),
    tree("csv, an absolute path as id", replaced(XRAY_TABLE, "\n1000,", "\n/etc/passwd,"),
         "a row for /etc/passwd, but no such image", XRAY_TABLE.name),
    tree("csv, a formula for a hospital", replaced(NORMAL_TABLE, "Negin", "=cmd|' /C calc'!A0"),
         "takes for a formula", NORMAL_TABLE.name),
    tree("csv, a formula in free text", replaced(XRAY_TABLE, "bilateral PTB", "=1+1"),
         note="it is passed on to nothing"),
    tree("csv, NUL bytes", edited(XRAY_TABLE, lambda c: c + b"\0"), "NUL bytes", XRAY_TABLE.name),
    tree("csv, an open quote", replaced(XRAY_TABLE, "\n1000,", '\n"1000,'), "no readable csv",
         XRAY_TABLE.name),
    tree("csv, a field of 200,000 characters", replaced(XRAY_TABLE, "bilateral", "b" * 200_000),
         "field larger than field limit", XRAY_TABLE.name),
    tree("csv, a hospital of 1,000 characters", replaced(NORMAL_TABLE, "Negin", "N" * 1000),
         "at most 500 characters", NORMAL_TABLE.name),
    tree("csv of 33 MiB", lambda raw: os.truncate(raw / XRAY_TABLE, 33 * 2**20),
         "33 MiB, of at most 32", XRAY_TABLE.name),
    tree("csv, a pipe (FIFO) in its place", lambda raw: (
         (raw / XRAY_TABLE).unlink(), os.mkfifo(raw / XRAY_TABLE)), "no file", XRAY_TABLE.name),
    tree("a collection that is a link", moved(XRAYS), note="to wherever it lies"),
    tree("a class folder that is a link", moved(STUDIES / "CT-1")),
    tree("images that are links", every_link, note="into a store"),
    tree("a link to nothing", instead(lambda path: path.symlink_to("gone.png")),
         "a link to nothing (gone.png)", SLICE),
    tree("a link in a circle", instead(lambda path: path.symlink_to(path)), "a link to nothing",
         SLICE),
    tree("a class folder that is a link in a circle", lambda raw: (
         (raw / STUDIES / "CT-9").symlink_to("CT-9")), "a link to nothing (CT-9)", "CT-9"),
    tree("a link to a file that is no picture", instead(lambda path: path.symlink_to(__file__)),
         OFF, SLICE),
    tree("a link to a device", instead(lambda path: path.symlink_to("/dev/zero")),
         "neither a file nor a folder", SLICE),
    tree("a folder named x.png", beside("x.png", Path.mkdir), "a folder", "x.png"),
    tree("a pipe (FIFO) named x.png", beside("x.png", os.mkfifo), "neither a file nor a folder",
         "x.png"),
    tree("a pipe (FIFO) for a volume", lambda raw: os.mkfifo(
         raw / STUDIES / "CT-0" / "study_0901.nii"), "neither a file nor a folder", "study_0901"),
    tree("a picture that may not be read", unreadable(COVID / SLICE), "Permission denied", SLICE),
    tree("a table that may not be read", unreadable(XRAY_TABLE), "Permission denied",
         XRAY_TABLE.name),
    tree("a name with spaces, quotes and %", renamed("P 001 \"'%41%.png")),
    tree("a name that begins with a dash", renamed("-rf.png")),
    tree("a name of 255 bytes", renamed("x" * 251 + ".png")),
    tree("a name in Unicode's other form", renamed(NFD, NFC), note="the forms are one name"),
    tree("both forms of a name side by side", lambda raw: (
         renamed(NFC)(raw), (raw / COVID / NFD).write_bytes((raw / COVID / NFC).read_bytes())),
         "a second file of that name", "laga_60.png"),
    tree("two names that differ in case", beside("1000.PNG", written(plain())),
         "a second file of that name", "1000."),
    tree("an upper-case ending", lambda raw: (raw / XRAY / "1000.png").rename(
         raw / XRAY / "1000.PNG"), note="an X-ray goes by its number"),
    tree("an upper-case ending that the table does not have", lambda raw: (
         (raw / COVID / SLICE).rename(raw / COVID / SLICE.upper())), f"no row in {CSV}",
         SLICE.upper()),
    tree("a name that is no Unicode", beside(b"\xff.png", written(plain())), "a name with",
         r"\udcff.png"),
    tree("a name with control characters", beside("\x1b[2J.png", written(plain())), "a name with",
         r"\x1b[2J.png"),
    tree("a name with a line end", beside("x\ny.png", written(plain())), "a name with",
         r"x\ny.png"),
    tree("what file managers leave behind", beside("Thumbs.db", written(b"x")), note="passed over"),
    tree("a file of another kind", beside("x.tiff", written(b"II*\0")), "no image of a known kind",
         "x.tiff"),
    tree("digits of another script in a volume's name", lambda raw: (
         (raw / STUDIES / "CT-0" / "study_٠٠٠١.nii").write_bytes(nifti())), "the name study_",
         "study_٠٠٠١.nii"),
    tree("a volume twice, gzipped and not", lambda raw: (
         (raw / STUDIES / "CT-1" / "study_0003.nii").write_bytes(nifti())), "a second time",
         "study_0003.nii"),
    tree("a volume of no bytes", lambda raw: (
         (raw / STUDIES / "CT-1" / "study_0901.nii").write_bytes(b"")), "no readable volume",
         "study_0901.nii"),
]  # fmt: skip


# --- The table -------------------------------------------------------------------------------

HEAD = """# Bad and odd input, and what happens to it

This is tests/corpus.py as a table (`python tests/corpus.py > docs/bad-input.md`); the tests make
each of these files and see that it is so. What is refused ends a stage with exit code 1 and a
message that names the file, what was found, what was expected and what to do; all that is wrong is
listed at once, nothing half-written is left, and what was there before stays. (Before a stage DVC
takes away what it wrote last time, but for metrics and plots; `dvc checkout` brings it back.)

- **Links** are followed, to wherever: data sets are often kept in a store of their own, and
  `data/raw/study`, a collection, a folder in it or a file may be a link into it. Names that a table
  states are only ever looked up among the files that the folder lists, so that no table can make a
  stage open another file. A link to nothing, or in a circle, is refused.
- **Sizes** are judged before anything is unpacked: no file takes more than a gibibyte of memory.
- **What cannot be noticed**: damage inside a JPEG that has its end mark, be it a changed byte, an
  end mark too early or a piece of zeros, and a changed byte in a volume that is not gzipped, since
  neither has a checksum; and in a csv where the text stays a possible one.
"""


def described(case: Case) -> str:
    happens = f"refused: `{case.told}`" if case.told else f"read{case.note and ': '}{case.note}"
    return f"| {case.kind} | {happens} |"


def table(title: str, cases: list[Case]) -> str:
    return "\n".join(["", f"## {title}", "", "| what | happens |", "| --- | --- |",
                      *map(described, cases), ""])  # fmt: skip


def document() -> str:
    return HEAD + "".join([
        table("Volumes", VOLUMES), table("Pictures", PICTURES),
        table("Collections: tables, links and names", TREES),
    ])  # fmt: skip


if __name__ == "__main__":
    print(document(), end="")
