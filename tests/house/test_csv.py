"""The CSV of the API, the command and the page."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from result_store.api.formats import CSV
from scanfleet_cli.output import Format, Output

PAGE: Final = Path(__file__).parents[2] / "page"

# Imports the page's module without its types, and prints the line of each row on standard input.
SCRIPT: Final = """
import { readFileSync } from "node:fs";
import { transformSync } from "esbuild";
const { code } = transformSync(readFileSync("src/text.ts", "utf-8"), { loader: "ts" });
const { csvLine } = await import(`data:text/javascript,${encodeURIComponent(code)}`);
console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf-8")).map(csvLine)));
"""

CELLS: Final = {
    # Controls, formats, private use, and spaces that look like U+0020 or break lines.
    "a\tb\nc\rd": r"a\tb\nc\rd",
    "\0\b\x1b\x7f\x85\x9b\xad": r"\x00\x08\x1b\x7f\x85\x9b\xad",
    "\u0600\u200b\u202e\u2066\ue000\ufeff": r"\u0600\u200b\u202e\u2066\ue000\ufeff",
    "\U000e0001\U0010fffd": r"\U000e0001\U0010fffd",
    "\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000": r"\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000",
    # Printable text.
    " a \\n e\u0301 \u2603 \U0001f600": " a \\n e\u0301 \u2603 \U0001f600",
    "C++ root@host 1 - 2; 3 - 4": "C++ root@host 1 - 2; 3 - 4",
    'a,"b"': '"a,""b"""',
    # Formulas; a space that is escaped is text before them.
    "=1+1": "'=1+1",
    " @SUM(1)": "' @SUM(1)",
    "x;-1|  +1": "x;'-1|'  +1",
    "\uff1d1": "'\uff1d1",
    "\xa0=1": r"\xa0=1",
    "\u3000;\uff0b1": "\\u3000;'\uff0b1",
}
LINES: Final = [f"x,{cell}\r\n" for cell in CELLS.values()]


class Row(BaseModel):
    first: str = "x"
    text: str


def test_csv_of_the_api_has_escapes_and_no_formula() -> None:
    """result-store writes unprintable characters as escapes, and no formula."""
    assert [CSV.row(Row(text=text), ("first", "text")) for text in CELLS] == LINES


def test_csv_of_the_command_is_that_of_the_api() -> None:
    """The command writes the same cells as result-store."""
    output = Output(stdout := io.StringIO(newline=""))
    output.format = Format.CSV
    output.many([Row(text=text).model_dump() for text in CELLS], ())
    assert stdout.getvalue() == "".join(["first,text\r\n", *LINES])


def test_csv_of_the_page_is_that_of_the_api() -> None:
    """The page saves the same cells as result-store."""
    command = ["node", "--input-type=module", "--eval", SCRIPT]
    rows = json.dumps([["x", text] for text in CELLS])
    run = subprocess.run(command, cwd=PAGE, input=rows, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"`make setup` installs what the page is built from: {run.stderr}"
    assert json.loads(run.stdout) == LINES
