"""Tests of the audit of dependencies: pip-audit, with a server in place of OSV."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.audit import main


class _Database(BaseHTTPRequestHandler):
    """Knows one vulnerability, of each version of Pillow.

    Attributes:
        queried: Names of the packages in the requests.
        status: Status of the answers.
    """

    protocol_version = "HTTP/1.1"
    # Sends headers and body together, without which each request takes 40 ms.
    wbufsize = -1
    queried: set[str]
    status: int

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package = query["package"]
        self.queried.add(package["name"])
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999.0"}]}]
        known = {"id": "PYSEC-1", "affected": [{"package": package, "ranges": ranges}]}
        answer = json.dumps({"vulns": [known]} if package["name"] == "pillow" else {}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@contextlib.contextmanager
def run_database(status: int) -> Iterator[tuple[str, set[str]]]:
    """Yields the address of a database, and the set of packages that it was asked for."""

    class Database(_Database):
        pass

    Database.queried, Database.status = set(), status
    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query", Database.queried
        server.shutdown()
        thread.join()


def test_vulnerability_of_a_pinned_version_fails_unless_it_is_accepted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_database(status=200) as (url, queried):
        assert main([f"--osv-url={url}"]) == 1
        assert re.search(r"^pillow +\S+ +PYSEC-1 +999\.0", capsys.readouterr().out, re.MULTILINE)
        assert main([f"--osv-url={url}", "--ignore-vuln=PYSEC-1"]) == 0
        assert "1 ignored" in capsys.readouterr().out
    # Of every file, those for this platform.
    for name in ("jax", "torch", "mkdocs", "onnx", "gcsfs", "libtpu", "bandit"):
        assert name in queried


def test_unreachable_database_is_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    with run_database(status=503) as (url, _):
        assert main([f"--osv-url={url}"]) == 0
    assert "NOT AUDITED" in capsys.readouterr().out
    # The server has ended.
    assert main([f"--osv-url={url}"]) == 0
    assert "NOT AUDITED" in capsys.readouterr().out


def test_wrong_option_is_not_taken_for_an_unreachable_database() -> None:
    assert main(["--no-such-option"]) not in (0, 1)
