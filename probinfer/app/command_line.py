"""The command line: ``probinfer demo``, ``gp DATA.csv --target COLUMN``, ``generate``, ``check`` and ``bench NAME``.

Mistakes of a user print one line and exit with code 2; ``--debug`` shows where they were found. The commands compute in
64-bit floats: an application may decide that, the library never does.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import sys
from collections.abc import Iterator
from typing import Annotated

import rich.console
import rich.markup
import rich.table
import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="probinfer",
    help="Bayesian inference that tunes itself and checks itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_Out = Annotated[str, typer.Option("--out", help="Folder for the report.", show_default=True)]
_Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same numbers.", min=0)]
_Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something goes wrong.")]


def main() -> None:
    """Entry point of the command ``probinfer``."""
    app()


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"probinfer {importlib.metadata.version('probinfer')}")
        raise typer.Exit
    return bool(value)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Bayesian inference that tunes itself and checks itself.

    [bold]probinfer demo[/bold]: see it work on real data, with a report.

    [bold]probinfer gp DATA.csv --target COLUMN[/bold]: predict a column of your table, with honest error bars.

    [bold]probinfer generate --model FOLDER --prompt TEXT[/bold]: let a language model think in particles.

    [bold]probinfer check[/bold]: the library checks its own engines, and says what the checks could have seen.
    """


@app.command()
def demo(
    out: _Out = "probinfer-report",
    small: Annotated[
        bool, typer.Option("--small", help="Less data and fewer draws: faster, rougher.")
    ] = False,
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    """See the ways to learn a Gaussian process on four real data sets, and a language model think in particles.

    Takes several minutes on two cores. Prints a table of scores on unseen data and writes a page with plots.
    """
    with _user_errors(debug), _working() as console:
        from probinfer.app.demo import demo as demos

        size = demos.SMALL if small else demos.FULL
        path = demos.run_demo(out, size, seed=seed, command=_command(), console=console)
        _point_to(console, path)


@app.command("gp")
def gp_command(
    file: Annotated[str, typer.Argument(metavar="DATA.csv", help="A table with one header line.")],
    target: Annotated[str, typer.Option("--target", help="The column to predict.")],
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="nuts, hmc, full-rank, mean-field, map or ml2; auto: nuts up to 300 rows, else map.",
        ),
    ] = "auto",
    kernel: Annotated[
        str, typer.Option("--kernel", help="matern12, matern32, matern52, rbf or rq.")
    ] = "matern52",
    folds: Annotated[int, typer.Option("--folds", help="Parts of the cross-validation; 0: none.")] = 5,
    predict: Annotated[
        str | None,
        typer.Option("--predict", metavar="NEW.csv", help="Rows to predict: predictions.csv in the folder."),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", help="A column to leave out; may be repeated.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="Draws of each of the four chains of nuts.")] = 500,
    out: _Out = "probinfer-report",
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    r"""Predict one column of a table from the others, with honest error bars.

    Fits a Gaussian process, scores it on rows that it has not seen, and writes a page with plots, the saved fit
    (fit.npz) and the predictions as CSV. The first fit compiles for some ten seconds; with its folds, a table of 100
    rows takes one to two minutes with nuts and about twenty seconds with map.

    Plots need pip install 'probinfer\[plots]'.
    """
    with _user_errors(debug), _working() as console:
        from probinfer.app.commands.regression import Options, run_regression

        options = Options(
            target=target,
            engine=engine,
            kernel=kernel,
            folds=folds,
            drop=tuple(drop or ()),
            predict=predict,
            out=out,
            seed=seed,
            draws=draws,
        )
        path = run_regression(file, options, command=_command(), console=console)
        _point_to(console, path)


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Option("--model", help="A Hugging Face checkpoint folder, or reasoner: the small bundled one."),
    ] = "reasoner",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT|@FILE|-",
            help="The prompt; - reads it from the standard input. The reasoner takes chains such as "
            "'7 + 5 * 3', without one a problem drawn by the seed.",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            metavar="model|none|MODULE:FUNCTION",
            help="A Python function (prompt, text) -> number, also FILE.py:FUNCTION; model: the one that came "
            "with the model, which is the default where there is one.",
        ),
    ] = None,
    meaning: Annotated[
        str | None,
        typer.Option(
            "--meaning",
            help="What its numbers mean: twist (the default of functions), likelihood, odds or terminal.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="particle-filter, entropic, nested, particle-gibbs, parallel-tempering, best-of-n, "
            "weighted-best-of-n, majority, beam, dvts or greedy. Adaptive and Exact exist only in Python.",
        ),
    ] = "particle-filter",
    n: Annotated[int, typer.Option("--n", help="Texts that are worked on at once.")] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Most tokens of a text.", show_default="512, or what fits"),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--step",
            help="Where a step ends: a string, or a number of tokens.",
            show_default="an empty line; for the reasoner a line",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the tokens; 1 is the model itself.")
    ] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template of the model.")
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends a text; may be repeated.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            "--answer",
            help="What counts as the answer of a text: boxed (LaTeX), number (the last one) or text (all).",
            show_default="boxed; for the reasoner the line 'Answer: ...'",
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result for machines.")
    ] = None,
    live: Annotated[bool, typer.Option("--live/--no-live", help="Show the steps as they come.")] = True,
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    r"""Let a language model write N texts at once, weighed step by step by a reward, and vote on their answers.

    Texts of little weight are replaced by copies of better ones after each step. Prints the answers with their
    probabilities, the evidence, what distribution the texts are drawn from, and what it cost. Without options it solves
    a problem of the small bundled model. Exit code 1 if no text was left with a positive weight.

    Reading models needs pip install 'probinfer\[lm]'.
    """
    with _user_errors(debug):
        from probinfer.app.commands.generate import Options, run_generate

        # In the order of their definition.
        text = Options(model, prompt, reward, meaning, method, n, max_tokens, step, temperature, chat)
        options = text._replace(stop=tuple(stop or ()), answer=answer, json=json, live=live, seed=seed)
        found = run_generate(options, command=_command(), console=_console())
    if found.status != 0:
        raise typer.Exit(1)


@app.command()
def check(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer checks and simulations: under a minute on two cores.")
    ] = False,
    out: _Out = "probinfer-check",
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    """Let the library judge its own engines, and print the verdicts (a few minutes on two cores).

    Draws against exact answers, calibration on simulated data, joint tests of the Markov kernels. Writes a page with
    numbers and plots. Exit code 1 if an engine fails that should pass, or one passes everywhere that should fail.
    """
    with _user_errors(debug), _working() as console:
        from probinfer.app.commands import check as checking

        effort = checking.QUICK if quick else checking.FULL
        path, surprises = checking.run_check(out, effort, seed=seed, command=_command(), console=console)
        _point_to(console, path)
    if surprises:
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="Which; without a name they are listed.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to the script.")] = None,
    debug: _Debug = False,
) -> None:
    """Run a benchmark of the repository, or list them."""
    with _user_errors(debug):
        from probinfer.app.commands.bench import benchmark_folder, benchmarks, run_benchmark

        folder = benchmark_folder()
        if name is None:
            table = rich.table.Table(
                "name", "question", title=f"Benchmarks in {folder}", title_justify="left"
            )
            for known, question in benchmarks(folder).items():
                table.add_row(known, question)
            rich.console.Console().print(table)
            return
        code = run_benchmark(folder, name, arguments or [])
    raise typer.Exit(code)


@contextlib.contextmanager
def _user_errors(debug: bool) -> Iterator[None]:
    """Turn errors that speak to the user into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ArithmeticError, ImportError, OSError, MemoryError) as error:
        if debug:
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(
            f"error: {text} (--debug shows where)" if _is_foreign(error) else f"error: {text}", err=True
        )
        raise typer.Exit(2) from error


def _is_foreign(error: BaseException) -> bool:
    """Whether an error was raised outside this package, so that its text may need its place to be understood."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("probinfer")


@contextlib.contextmanager
def _working() -> Iterator[rich.console.Console]:
    """64-bit floats, and one display: progress and lines of text share a console."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from probinfer.running import progress

    console = _console()
    if not console.is_terminal:
        yield console
        return
    with progress.display(console):
        yield console


def _console() -> rich.console.Console:
    """The terminal; where there is none: no bars, and room for whole rows of a table."""
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=max(console.width, 120))


def _point_to(console: rich.console.Console, path) -> None:
    console.print(f"report: [bold]{rich.markup.escape(str(path))}[/bold]", soft_wrap=True)


def _command() -> str:
    """What the user typed."""
    return shlex.join(["probinfer", *sys.argv[1:]])


if __name__ == "__main__":
    main()
