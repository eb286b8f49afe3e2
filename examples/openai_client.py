"""Asks a running inference server a question about a long document, with the official OpenAI client.

Prints the answer, and from the server's /metrics what each rank holds of it: the pages of the
document are spread over all ranks.
"""

from __future__ import annotations

import argparse
import http.client
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openai
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples import prompts
from pikv_ds.errors import UsageError
from pikv_ds.tools.command_line import Parser, guarded, real, whole

EXAMPLES = """examples:
  python examples/openai_client.py --url http://localhost:8000
  python examples/openai_client.py --prompt-file report.txt --question "What was decided?"
"""

DOCUMENT, QUESTION, PREFIX = "alice", "What was written on the little bottle?", "On the little bottle was written"
"""The demo's document, question, and how the answer begins: a model of this size needs the help."""

FIGURES = ("own_tokens", "tokens", "pages", "kv_bytes")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="text file (default: the beginning of Alice in Wonderland)"
    )
    parser.add_argument("--question", default=QUESTION, help="asked after the document (default: %(default)s)")
    parser.add_argument(
        "--words", type=whole(), default=2000, metavar="N", help="most words of the document (default: 2000)"
    )
    parser.add_argument(
        "--max-tokens", type=whole(), default=16, metavar="N", help="of the answer (default: %(default)s)"
    )
    parser.add_argument(
        "--wait",
        type=real(0, 86400, "use seconds, at most 86400"),
        default=0.0,
        metavar="SECONDS",
        help="wait so long for the server to be up",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    return guarded("error", lambda: ask(args))


def ask(args: argparse.Namespace) -> int:
    """Asks the server; returns the exit code."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    try:
        prefix = PREFIX if args.question == QUESTION and not args.prompt_file else ""
        text = Path(args.prompt_file).read_text() if args.prompt_file else prompts.texts()[DOCUMENT]
        wait_for(args.url, args.wait)
        document = " ".join(text.split(" ")[: args.words])
        client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none", max_retries=0, timeout=3600.0)
        model = client.models.list().data[0].id
        watch = Watch(args.url)
        started = time.perf_counter()
        with console.status(f"{model} reads …"), watch:
            answer = client.completions.create(
                model=model,
                prompt=f"{document}\n\nQuestion: {args.question}\nAnswer: {prefix}",
                max_tokens=args.max_tokens,
                temperature=0,
            )
    except openai.OpenAIError as error:
        raise OSError(f"{args.url}: {error}") from None
    usage = answer.usage
    console.print(f"[bold]{escape(args.question)}[/]")
    console.print(prefix + answer.choices[0].text.rstrip(), highlight=False, markup=False)
    if usage is not None:
        seconds = time.perf_counter() - started
        console.print(
            f"\n{usage.prompt_tokens:,} + {usage.completion_tokens} tokens in {seconds:.0f} s", highlight=False
        )
    console.print(watch.table())
    return 0


def wait_for(url: str, seconds: float) -> None:
    """Until the server answers, or for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise OSError(f"{url} does not answer ({error}); start launch/megatron_server.sh first") from None
        except (ValueError, http.client.InvalidURL) as error:
            raise UsageError(f"--url {url}: {error}; write e.g. http://localhost:8000") from None
        time.sleep(0.5)


class Watch:
    """Reads the ranks' figures while the request runs, and keeps the fullest moment: afterwards all is released."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fullest: dict[str, dict[str, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.3):
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            now = {n: dict(re.findall(rf'^pikv:{n}{{rank="(\d+)"}} (\S+)$', text, re.MULTILINE)) for n in FIGURES}
            figures = {name: {rank: float(x) for rank, x in ranks.items()} for name, ranks in now.items()}
            if sum(figures["tokens"].values()) >= sum(self.fullest.get("tokens", {}).values()):
                self.fullest = figures

    def table(self) -> Table:
        """One line per rank."""
        table = Table(title="KV cache while the answer was made", title_justify="left")
        for name in ("rank", "own tokens", "held tokens", "pages", "held KV"):
            table.add_column(name, justify="right")
        for rank in sorted(self.fullest.get("tokens", {}), key=int):
            own, tokens, pages, size = (self.fullest[name][rank] for name in FIGURES)
            table.add_row(rank, f"{own:,.0f}", f"{tokens:,.0f}", f"{pages:,.0f}", f"{size / 2**20:,.1f} MiB")
        return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
