"""Document files to text: plain text, Markdown, PDF."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from rapid_integrations.errors import DocumentError

_PDF_SIGNATURE = b"%PDF-"
# UTF-16 and UTF-32 are only recognised by their byte order mark; UTF-32's begins with UTF-16's.
_MARKED_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control characters that do not occur in text files. Tabs, line ends and form feeds do.
_BINARY = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def read_document(path: str | Path) -> str:
    r"""Read a document's text.

    A file that begins with a PDF signature is read as PDF, whatever its name; any other file must be text:
    UTF-8, or UTF-16 or UTF-32 with a byte order mark. Markdown is not converted.

    Args:
        path: The file.

    Returns:
        The text, never blank; line ends are ``\n``, a PDF's pages are separated by blank lines.

    Raises:
        DocumentError: The file is missing, a folder, unreadable, empty, not text, a PDF that is encrypted,
            damaged or without text, or a PDF while pypdf is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise DocumentError(f"'{path}' is a folder: name one text, Markdown or PDF file.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"'{path}' does not exist: check the path.") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DocumentError(f"'{path}' cannot be read: {reason}.") from error
    if content.lstrip()[: len(_PDF_SIGNATURE)] == _PDF_SIGNATURE:
        text = _read_pdf(path)
        if not text.strip():
            raise DocumentError(
                f"'{path}' is a PDF without text, probably a scan: run it through text "
                "recognition (OCR) first."
            )
        return text
    text = _decode(path, content)
    if not text.strip():
        raise DocumentError(f"'{path}' is empty: it must hold some text.")
    return text


def _decode(path: Path, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKED_ENCODINGS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"'{path}' is not text: byte {error.start:,} is not valid {encoding.upper()}. Give a text or "
            "Markdown file in UTF-8, or a PDF."
        ) from None
    if found := _BINARY.search(text):
        raise DocumentError(
            f"'{path}' is not text: it holds the control character {found.group()!r}. Give a text or "
            "Markdown file in UTF-8, or a PDF."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise DocumentError(
            f"'{path}' is a PDF, and reading PDFs takes pypdf: pip install 'rapid-integrations[docs]'"
        ) from None
    try:
        reader = PdfReader(path)
        # Many PDFs are encrypted with an empty password, which only restricts printing and the like.
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"'{path}' is encrypted: save it without a password first.")
        pages = [page.extract_text() for page in reader.pages]
    except DocumentError:
        raise
    except ImportError as error:  # AES needs a cryptography package
        raise DocumentError(f"'{path}' is encrypted, and pypdf cannot decrypt it here: {error}.") from error
    # For a damaged file pypdf raises many kinds of errors.
    except (PyPdfError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DocumentError(f"'{path}' is a damaged PDF: {reason}") from error
    return "\n\n".join(page.strip() for page in pages if page.strip())
