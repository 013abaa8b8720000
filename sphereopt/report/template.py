"""The templates of the pages, which share one style sheet."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

__all__ = ["fill", "our_script"]

#: The frame of all pages, that of the pages on logs, and what these have in common.
_SHARED = ("base.html.jinja", "log.html.jinja", "parts.html.jinja")


def fill(package: str, name: str, **values: Any) -> str:
    """Return a page: a template of a package, in the frame that all pages share.

    Args:
        package: The package that holds the template.
        name: Its file.
        **values: What the template shows; all text is escaped.

    Returns:
        The HTML document.

    Raises:
        ImportError: If jinja2 is missing; the extra ``report`` brings it.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    shared = [("sphereopt.report", file) for file in _SHARED]
    texts = {
        file: files(where).joinpath(file).read_text(encoding="utf-8")
        for where, file in (*shared, (package, name))
    }
    environment = Environment(
        loader=DictLoader(texts),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def our_script() -> dict[str, Any]:
    """Return what a page needs to run the script that sorts its table, and no other.

    Returns:
        The script, and the hash by which the page's security policy knows it.
    """
    from markupsafe import Markup

    script = files("sphereopt.report").joinpath("run.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"scripts": f"'sha256-{digest}'", "script": Markup(script)}
