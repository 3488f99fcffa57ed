"""The API keeps to what it says of itself: schemathesis reads the document, and asks the program everything that it allows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.api import ROUTES
from tests.program import COMMAND, Program, configuration, ended_with, partner, until

SECONDS = 20
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,ignored_auth,unsupported_method"
)


@pytest.mark.timeout(150)
def test_whatever_its_document_allows_to_be_asked_is_answered_as_it_says(dsn: str, tmp_path: Path) -> None:
    with partner() as sink:
        sink.mood = lambda _: 400
        program = Program(tmp_path, configuration(partner=sink.address, database="env:DSN"), environ={"DSN": dsn})
        with ended_with(program):
            program.start().ready()
            program.accept()
            until(lambda: sink.received, 10, "a dead letter")
            token = subprocess.run(
                [*COMMAND, "token", "create", "--name", "asking", "--role", "lead", "--config", str(program.path)],
                env=program.environ, capture_output=True, check=True, text=True,
            ).stdout.split()[-1]  # fmt: skip
            address = f"http://127.0.0.1:{program.port}/api/v1"
            asked = subprocess.run(
                [
                    str(Path(sys.executable).with_name("schemathesis")), "run", f"{address}/openapi.json",
                    "--url", address, "--header", f"Authorization: Bearer {token}", "--checks", CHECKS,
                    "--phases", "examples,coverage,fuzzing", "--max-time", str(SECONDS),
                    "--generation-deterministic", "--no-color",
                    "--request-timeout", "10",
                ],
                capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
            )  # fmt: skip
            assert asked.returncode == 0, asked.stdout + asked.stderr
            generated = re.search(r"([0-9]+) generated, \1 passed", asked.stdout)
            assert generated is not None, asked.stdout
            assert int(generated[1]) > 300, "it was really asked"
            assert f"{len(ROUTES) - 1} selected" in asked.stdout, "all but the document itself"
            assert program.stop() == 0
            assert not program.log("request.failed")
