"""The documents say what the code does: keys, files, messages and links are compared with it."""

import pytest
from conftest import ROOT, run_inside

from medqlora.core.config_loading import all_keys

DOCS = ROOT / "docs"


# ---- docs/config.md ------------------------------------------------------------------------------


def test_the_page_of_the_configuration_is_current(monkeypatch, tmp_path):
    script = DOCS / "make_config.py"
    assert run_inside(script, ["--check", DOCS / "config.md"], monkeypatch) == (0, "")
    old = tmp_path / "config.md"
    old.write_text((DOCS / "config.md").read_text().replace("`0.0002`", "`0.0001`"))
    code, complaint = run_inside(script, ["--check", old], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "does not say what the schema says" in complaint
    assert run_inside(script, ["--write", old], monkeypatch) == (0, "")
    assert old.read_text() == (DOCS / "config.md").read_text()


@pytest.mark.parametrize("key", all_keys())
def test_every_key_of_the_configuration_is_described(key):
    assert f"| `{key}` |" in (DOCS / "config.md").read_text(encoding="utf-8")
