"""Documents of every kind, readable and not."""

import builtins
import errno
import sys

import pytest

from rapid_integrations.errors import DocumentError, RapidError
from rapid_integrations.retrieval.document_files import read_document


def pdf(*pages: str) -> bytes:
    """A PDF written by hand, one line of text a page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>")
    for i, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode("latin-1")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.pdf"])
def test_utf8_text_is_read_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("# Überschrift\r\n\r\n* ein\tPunkt\rzwei — 数\n".encode())
    assert read_document(path) == "# Überschrift\n\n* ein\tPunkt\nzwei — 数\n"
    assert read_document(str(path)) == read_document(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_gives_the_encoding_and_is_removed(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("Größe 12".encode(encoding))
    assert read_document(path) == "Größe 12"


def test_a_pdfs_pages_are_read_in_order(tmp_path):
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf("The Milrura mill passcode is 718889.", "Second page."))
    assert read_document(path) == "The Milrura mill passcode is 718889.\n\nSecond page."


def test_a_pdf_is_recognised_by_its_content(tmp_path):
    path = tmp_path / "report.txt"
    path.write_bytes(pdf("Plain words."))
    assert read_document(path) == "Plain words."


def test_without_pypdf_the_error_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf("text"))
    real_import = builtins.__import__

    def without_pypdf(name, *args, **kwargs):
        if name.split(".")[0] == "pypdf":
            raise ModuleNotFoundError("No module named 'pypdf'", name="pypdf")
        return real_import(name, *args, **kwargs)

    for module in [name for name in sys.modules if name.split(".")[0] == "pypdf"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_pypdf)
    with pytest.raises(DocumentError, match=r"pip install 'rapid-integrations\[docs\]'"):
        read_document(path)


def test_a_pdf_with_a_password_is_refused(tmp_path):
    from pypdf import PdfReader, PdfWriter

    plain = tmp_path / "plain.pdf"
    plain.write_bytes(pdf("secret words"))
    for password, name in (("secret", "locked.pdf"), ("", "restricted.pdf")):
        writer = PdfWriter(clone_from=PdfReader(plain))
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
        writer.write(tmp_path / name)
    with pytest.raises(DocumentError, match="encrypted: save it without a password"):
        read_document(tmp_path / "locked.pdf")
    assert read_document(tmp_path / "restricted.pdf") == "secret words"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t \r\n", "is empty"),
        (bytes(range(256)), r"is not text: byte 128 is not valid UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not text: byte 0"),
        (b"abc\x00def", r"is not text: it holds the control character '\\x00'"),
        (b"\xff\xfea", "is not text: byte 2 is not valid UTF-16"),
        (b"%PDF-1.7\nrubbish", "is a damaged PDF"),
        (pdf(""), "PDF without text"),
    ],
)
def test_unsupported_files_raise(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message) as raised:
        read_document(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, RapidError)
    assert isinstance(raised.value, ValueError)


def test_missing_files_and_folders_have_their_own_errors(tmp_path):
    with pytest.raises(DocumentError, match="does not exist"):
        read_document(tmp_path / "nowhere.txt")
    with pytest.raises(DocumentError, match="is a folder"):
        read_document(tmp_path)


def test_an_unreadable_file_gives_the_reason(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(DocumentError, match=r"a\.txt' cannot be read: Permission denied\."):
        read_document(tmp_path / "a.txt")
