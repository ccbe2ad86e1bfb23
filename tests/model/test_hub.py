"""What the hub refuses is one line that says what to do; a server of this machine stands for it."""

import http.server
import threading

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from medqlora.core.config import DataEntry
from medqlora.core.hub import explain_hub
from medqlora.data.examples import DataError
from medqlora.data.reading import read_entry
from medqlora.model.base import load_tokenizer, read_model_config
from medqlora.model.identity import resolve_base
from medqlora.model.weight_files import ModelError

# What the hub answers: status, and its own code for the reason.
REFUSALS = {
    "log in with `hf auth login`": (401, "GatedRepo"),
    "has no access; ask for it on": (403, "GatedRepo"),
    "the hub has no such": (404, "RepoNotFound"),
    "or it is private": (401, "RepoNotFound"),
    "no such revision": (404, "RevisionNotFound"),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Set `hub.answer` to (status, code); every file is refused with it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = server.answer
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    point_to(monkeypatch, place, tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, place, tmp_path):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", place)
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{place}/{{{path[2]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", place)


@pytest.mark.parametrize("part", REFUSALS)
@pytest.mark.parametrize("load", [read_model_config, load_tokenizer, resolve_base])
def test_a_refused_model_is_one_line(hub, part, load):
    hub.answer = REFUSALS[part]
    with pytest.raises(ModelError) as caught:
        load("owner/name")
    line = str(caught.value)
    assert line.startswith("model owner/name: ")
    assert part in line
    assert "\n" not in line


@pytest.mark.parametrize("part", [name for name in REFUSALS if "revision" not in name])
def test_a_refused_dataset_is_one_line(hub, part):
    hub.answer = REFUSALS[part]
    with pytest.raises(DataError, match=part) as caught:
        read_entry(DataEntry(format="medmcqa", path="owner/name"), "train")
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    # The library tries for half a minute before it raises this error.
    error = OSError("wrapped")
    error.__cause__ = LocalEntryNotFoundError("no connection")
    assert "cannot be reached; connect this machine, or give a folder" in explain_hub(error, "a/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids to ask the hub"):
        read_model_config("owner/name")
    assert "HF_HUB_OFFLINE" in explain_hub(OfflineModeIsEnabled("offline"), "owner/name")


def test_other_errors_are_not_the_hubs():
    assert explain_hub(ValueError("odd"), "owner/name") is None
