"""Web pages of one file each: they open from disk, ask the network for nothing and run no script but their own.

A page is a body between the style and the scripts of its name in the folder `web/`. Whatever comes
from a checkpoint, a text or a manifest enters the body through `fill`, `json_block` or `html.escape`;
the policy in the page's head lets no other script or style run, should one slip through.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxqkv.runtime.files import replacing, written

PARTS = Path(__file__).with_name("web")

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{title}}</title>
"""
# JSON that cannot end the element that it is in, whatever its strings say.
_IN_HTML = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


def write_page(path: Path, name: str, title: str, body: Iterable[str], scripts: Sequence[str] = ()) -> None:
    """Writes a page whole or not at all; the pieces of its body are made one after another, and not kept.

    Args:
      path: of the page.
      name: of its style and script.
      title: in the window's bar.
      body: pieces of HTML.
      scripts: parts of the script that come before the one of the page's name, as `NAME-PART`.
    """
    style = part("style.css") + part(f"{name}.css")
    script = "".join(part(f"{each}.js") for each in (*scripts, name))
    policy = (
        f"default-src 'none'; img-src 'self' file: data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    with written(path, "; choose another place with --out"), replacing(path) as file:
        head = fill(_HEAD, policy=policy, title=title)
        file.write(f"{head}<style>{style}</style>\n</head>\n<body>\n".encode())
        for piece in body:
            file.write(piece.encode(errors="backslashreplace"))  # a file's name may be no Unicode
        file.write(f"<script>{script}</script>\n</body>\n</html>\n".encode())


def part(name: str) -> str:
    """Returns a file of the folder `web/`."""
    return (PARTS / name).read_text(encoding="utf-8")


def fill(template: str, **fields: Any) -> str:
    """Returns the template with each `{{name}}` replaced by that field, escaped for text and attributes."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: html.escape(str(fields[place[1]])), template)


def json_block(id: str, value: Any) -> str:
    """Returns data for the page's script, in ASCII."""
    return f'<script type="application/json" id="{id}">{json.dumps(value).translate(_IN_HTML)}</script>\n'


def _digest(text: str) -> str:
    """Returns the name of a script or a style in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
