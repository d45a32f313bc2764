"""The command line: ``probinfer demo``, ``gp DATA.csv --target COLUMN``, ``generate``, ``check`` and ``bench NAME``.

User errors print one line and exit with code 2; ``--debug`` shows the traceback. The commands compute in 64-bit floats:
an application may decide that, the library never does.
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
    help="Bayesian inference in JAX that tunes itself and checks itself.",
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
    """Bayesian inference in JAX that tunes itself and checks itself.

    [bold]probinfer demo[/bold]: run the main methods on real data and write a report.

    [bold]probinfer gp DATA.csv --target COLUMN[/bold]: predict a column of your table, with calibrated error bars.

    [bold]probinfer generate --model FOLDER --prompt TEXT[/bold]: sample from a language model with particle methods.

    [bold]probinfer check[/bold]: test the library's own engines, and report which errors the checks can detect.
    """


@app.command()
def demo(
    out: _Out = "probinfer-report",
    small: Annotated[
        bool, typer.Option("--small", help="Less data and fewer draws: faster, less precise.")
    ] = False,
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    """Compare methods for Gaussian processes on four real data sets, and sample from a language model with particles.

    Takes several minutes on two cores. Prints tables of scores on held-out data and writes a page with plots.
    """
    with _user_errors(debug), _computing() as console:
        from probinfer.app.demo import demo as demo_module

        size = demo_module.SMALL if small else demo_module.FULL
        path = demo_module.run_demo(out, size, seed=seed, command=_command(), console=console)
        _print_report_path(console, path)


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
    folds: Annotated[int, typer.Option("--folds", help="Folds of the cross-validation; 0: none.")] = 5,
    predict: Annotated[
        str | None,
        typer.Option(
            "--predict", metavar="NEW.csv", help="Rows to predict; written to predictions.csv in the folder."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", help="A column to leave out; may be repeated.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="Draws of each of the four NUTS chains.")] = 500,
    out: _Out = "probinfer-report",
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    r"""Predict one column of a table from the others, with calibrated error bars.

    Fits a Gaussian process, scores it on held-out rows, and writes a page with plots, the saved fit (fit.npz) and the
    predictions as CSV. The first fit compiles for about ten seconds; with cross-validation, a table of 100 rows takes
    one to two minutes with nuts and about twenty seconds with map.

    Plots need pip install 'probinfer\[plots]'.
    """
    with _user_errors(debug), _computing() as console:
        from probinfer.app.commands.regression import RegressionOptions, run_regression

        options = RegressionOptions(
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
        _print_report_path(console, path)


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Option(
            "--model", help="A Hugging Face checkpoint folder, or reasoner: the small bundled model."
        ),
    ] = "reasoner",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT|@FILE|-",
            help="The prompt; - reads it from the standard input. The reasoner expects a chain such as "
            "'7 + 5 * 3'; without a prompt, it solves a random problem that the seed determines.",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            metavar="model|none|MODULE:FUNCTION",
            help="A Python function (prompt, text) -> number, also FILE.py:FUNCTION; model: the reward that "
            "comes with the model, the default if there is one.",
        ),
    ] = None,
    meaning: Annotated[
        str | None,
        typer.Option(
            "--meaning",
            help="What the reward's numbers mean: twist (default for functions), likelihood, odds or terminal.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="particle-filter, entropic, nested, particle-gibbs, parallel-tempering, best-of-n, "
            "weighted-best-of-n, majority, beam, dvts or greedy. Adaptive and Exact exist only in the Python API.",
        ),
    ] = "particle-filter",
    n: Annotated[int, typer.Option("--n", help="Number of texts generated in parallel.")] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", help="Maximum number of tokens of a text.", show_default="512, or what fits"
        ),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--step",
            help="Where a step ends: at a string, or after a number of tokens.",
            show_default="an empty line; for the reasoner a line",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Sampling temperature; 1 samples from the model itself.")
    ] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the chat template of the model to the prompt.")
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A string that ends a text; may be repeated.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            "--answer",
            help="How to extract the answer of a text: boxed (LaTeX), number (the last one) or text (all of it).",
            show_default="boxed; for the reasoner the line 'Answer: ...'",
        ),
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result to a JSON file.")
    ] = None,
    live: Annotated[bool, typer.Option("--live/--no-live", help="Show each step as it finishes.")] = True,
    seed: _Seed = 0,
    debug: _Debug = False,
) -> None:
    r"""Generate N texts in parallel, weight them by a reward after each step, and vote on their answers.

    After each step, texts of small weight are replaced by copies of texts of large weight. Prints the answers with
    their probabilities, the evidence, the distribution that the texts are drawn from, and the cost. Without options,
    the small bundled model solves a random problem. Exit code 1 if no text has a positive weight at the end.

    Loading models needs pip install 'probinfer\[lm]'.
    """
    with _user_errors(debug):
        from probinfer.app.commands.generate import GenerateOptions, run_generate

        options = GenerateOptions(
            model=model,
            prompt=prompt,
            reward=reward,
            meaning=meaning,
            method=method,
            n=n,
            max_tokens=max_tokens,
            step=step,
            temperature=temperature,
            chat=chat,
            stop=tuple(stop or ()),
            answer=answer,
            json=json,
            live=live,
            seed=seed,
        )
        answers = run_generate(options, command=_command(), console=_console())
    if answers.status != 0:
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
    """Test the library's own engines, and print the verdicts (a few minutes on two cores).

    Compares draws with exact answers, tests calibration on simulated data, and runs joint tests of the Markov
    transitions. Writes a page with numbers and plots. Exit code 1 if an engine fails that should pass, or if an engine
    that should fail passes every check.
    """
    with _user_errors(debug), _computing() as console:
        from probinfer.app.commands import check as check_module

        effort = check_module.QUICK if quick else check_module.FULL
        path, unexpected_results = check_module.run_check(
            out, effort, seed=seed, command=_command(), console=console
        )
        _print_report_path(console, path)
    if unexpected_results:
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    name: Annotated[
        str | None, typer.Argument(help="Name of the benchmark; without a name, all are listed.")
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for the script.")] = None,
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
            for benchmark_name, question in benchmarks(folder).items():
                table.add_row(benchmark_name, question)
            rich.console.Console().print(table)
            return
        exit_code = run_benchmark(folder, name, arguments or [])
    raise typer.Exit(exit_code)


@contextlib.contextmanager
def _user_errors(debug: bool) -> Iterator[None]:
    """Turn expected errors into one line of text and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ArithmeticError, ImportError, OSError, MemoryError) as error:
        if debug:
            raise
        # str(KeyError) would put quotes around the message.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(
            f"error: {text} (--debug shows where)" if _is_foreign(error) else f"error: {text}", err=True
        )
        raise typer.Exit(2) from error


def _is_foreign(error: BaseException) -> bool:
    """Whether an error was raised outside this package, so that its message may need the traceback to be understood."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("probinfer")


@contextlib.contextmanager
def _computing() -> Iterator[rich.console.Console]:
    """Switch on 64-bit floats, and share one console between progress bars and lines of text."""
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
    """The terminal; without a terminal, a console wide enough for the rows of a table."""
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=max(console.width, 120))


def _print_report_path(console: rich.console.Console, path) -> None:
    console.print(f"report: [bold]{rich.markup.escape(str(path))}[/bold]", soft_wrap=True)


def _command() -> str:
    """The command line that the user typed."""
    return shlex.join(["probinfer", *sys.argv[1:]])


if __name__ == "__main__":
    main()
