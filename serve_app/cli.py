"""`troupe`: start, stop, look at and talk to a house of sessions.

Only `up`, `demo` and `roll` load Ray, and late: the other commands speak HTTP and answer at once.
"""

import os
import signal
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from agent.faults import Fault, SettingsInvalid
from agent.vault import new_key as new_secrets_key
from serve_app.cli_chat import chat as chat_in
from serve_app.cli_client import Troupe
from serve_app.cli_demo import demo as demo_on
from serve_app.cli_models import SCRIPTED, choose
from serve_app.cli_run import Run, RunFile
from serve_app.cli_show import age, quoted, refusal
from serve_app.cluster import Cluster, Running
from serve_app.cluster import roll as roll_on
from serve_app.settings import ServeSettings, TroupeSettings, load_settings, with_absolute_paths
from serve_app.sse_client import Lost, Problem

DOWN_MARGIN_S = 60.0
"""Over what draining may take: to end Serve and Ray after the sessions came to rest."""

STARTING = "Starting Ray and Serve: this takes about half a minute, more on busy cores."
N_SHOWN = 20
"""Of the caller's sessions, in `status`."""
WIDE = 120
"""Columns from which `status` has room for more than what tells sessions apart."""

app = typer.Typer(
    name="troupe",
    help="LLM agent sessions on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold keys
)
console = Console(soft_wrap=True, emoji=False)

ConfigOption = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="A settings file over the defaults; may be repeated."),
]
UrlOption = Annotated[
    str | None, typer.Option(help="Where Troupe answers; else the one that runs here.")
]
KeyOption = Annotated[
    str | None,
    typer.Option(envvar="TROUPE_KEY", help="Your bearer key.", show_envvar=True),
]


def main() -> None:
    app()


@app.command()
def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="0: any free one.")] = None,
    dev: Annotated[
        bool | None, typer.Option("--dev", help="No keys, this machine only, user `dev`.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Any litellm name.")] = None,
    config: ConfigOption = None,
) -> None:
    """Start everything and stay; Ctrl-C drains and stops."""
    with faults_are_sentences(), stopping_on_signals():
        settings = _settings(config, host=host, port=port, dev=dev)
        choice = choose(model, settings.agent.default_model, os.environ)
        settings = _with_model(settings, choice.model)
        if not settings.serve.dev:
            from serve_app.auth import read_keys  # late: it brings FastAPI

            read_keys(settings.serve.keys_file)
        console.print(f"Model: [bold]{escape(choice.model)}[/] ({escape(choice.reason)})")
        with RunFile(settings.agent.storage_dir).held() as write:
            _run(settings, write)


def _run(settings: TroupeSettings, write: Any) -> None:
    cluster = Cluster(settings)
    console.print(STARTING)
    try:
        with console.status("Starting…"):
            running = cluster.start()
    except (KeyboardInterrupt, SystemExit):  # Ray's own handler of SIGTERM exits
        console.print("Interrupted while starting.")
        raise typer.Exit(130) from None
    try:
        write(_run_of(running, settings))
        _announce(running, settings)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        console.print("Stopping: sessions come to rest first (Ctrl-C again to skip that).")
    finally:
        cluster.stop()
    console.print("Stopped.")


def _run_of(running: Running, settings: TroupeSettings) -> Run:
    return Run(
        pid=os.getpid(),
        url=running.url,
        dashboard_url=running.dashboard_url,
        ray_address=running.ray_address,
        auth="dev" if settings.serve.dev else "keys",
        model=settings.agent.default_model,
        ray_auth_token=running.ray_auth_token,
    )


def _announce(running: Running, settings: TroupeSettings) -> None:
    auth = (
        "dev: no keys, this machine only, everybody is the user `dev`"
        if settings.serve.dev
        else f"bearer keys of {settings.serve.keys_file}"
    )
    run_file = RunFile(settings.agent.storage_dir).path
    console.print(f"URL: [bold]{running.url}[/]")
    console.print(f"Auth: {escape(auth)}")
    console.print(f"Ray dashboard: {running.dashboard_url or 'none'} (its token is in {run_file})")
    console.print("Talk to it with `troupe chat`; Ctrl-C or `troupe down` ends it.")


@app.command()
def down(config: ConfigOption = None) -> None:
    """Drain and stop what `up` started."""
    with faults_are_sentences():
        settings = _settings(config)
        file = RunFile(settings.agent.storage_dir)
        run = _running(file)
        # The lock on the file says that this process is the house: its id is not reused.
        os.kill(run.pid, signal.SIGTERM)
        actors = settings.actors
        limit_s = actors.drain_s + actors.close_wait_s + DOWN_MARGIN_S
        with console.status(f"Sessions come to rest; process {run.pid} ends…"):
            ended = file.wait_until_free(limit_s)
        if not ended:
            console.print(f"[red]Process {run.pid} has not ended after {limit_s:.0f} s.[/]")
            raise typer.Exit(1)
        console.print("Stopped.")


@app.command()
def roll(
    dev: Annotated[bool | None, typer.Option("--dev", help="As given to `up`.")] = None,
    model: Annotated[str | None, typer.Option(help="Any litellm name; else as before.")] = None,
    config: ConfigOption = None,
) -> None:
    """Have this installation's code take over the running house, session by session."""
    with faults_are_sentences(), stopping_on_signals():
        run = (
            None
            if "RAY_ADDRESS" in os.environ
            else _running(RunFile(_settings(config).agent.storage_dir))
        )
        if run is not None:
            os.environ.update(_way_to(run))
            dev, model = dev or run.auth == "dev" or None, model or run.model
        settings = _settings(config, dev=dev)
        choice = choose(model, settings.agent.default_model, os.environ)
        settings = _with_model(settings, choice.model)
        try:
            roll_on(settings, lambda line: console.print(escape(line)))
        except KeyboardInterrupt:
            console.print("Interrupted. The house runs on; `troupe roll` goes on with it.")
            raise typer.Exit(130) from None
        console.print("Everything runs the new code.")


def _way_to(run: Run) -> dict[str, str]:
    """What Ray needs in the environment to join the cluster of a house."""
    if run.ray_address is None:
        console.print(f"It is still starting (pid {run.pid}).")
        raise typer.Exit(1)
    way = {"RAY_ADDRESS": run.ray_address}
    if run.ray_auth_token is not None:
        way |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": run.ray_auth_token}
    return way


@app.command()
def status(url: UrlOption = None, key: KeyOption = None, config: ConfigOption = None) -> None:
    """Whether it runs, how full it is, and your sessions."""
    with faults_are_sentences(), _troupe(url, key, config) as troupe:
        ready = _ready(troupe)
        console.print(f"{troupe.http.base_url}: {'ready' if ready else '[red]not ready[/]'}")
        capacity = troupe.get("/v1/capacity")
        user = capacity["user"]
        console.print(
            f"Sessions live: {capacity['live']} of {capacity['limit']},"
            f" yours {user['live']} of {user['limit']}, warm actors {capacity['warm']}"
        )
        _show_sessions(troupe.get("/v1/sessions", limit=N_SHOWN))
        if not ready:
            raise typer.Exit(1)


def _show_sessions(page: dict[str, Any]) -> None:
    wide = console.width >= WIDE
    more = ("model", "messages", "USD") if wide else ()
    table = Table(
        Column("session", no_wrap=True),
        Column("status", no_wrap=True),
        Column("age", no_wrap=True, justify="right"),
        *more,
        Column("title", no_wrap=True, overflow="ellipsis", ratio=1),  # what the others leave
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        expand=True,
    )
    for one in page["data"]:
        spent = f"{one['spend_usd']:.4f}" + ("+" if one["n_unpriced"] else "")
        table.add_row(
            one["session_id"],
            one["status"],
            age(one["created_at"]),
            *((quoted(one["model"]), str(one["n_messages"]), spent) if wide else ()),
            quoted(one["title"] or ""),
        )
    console.print(table, soft_wrap=False)
    if page["next"]:
        console.print(f"There are more: these are the newest {N_SHOWN}.")


def _ready(troupe: Troupe) -> bool:
    try:
        troupe.get("/readyz")
    except Problem as problem:
        if problem.status == 503:
            return False
        raise
    return True


@app.command()
def key(
    user: Annotated[str, typer.Argument(help="Whose key: every key names a user.")],
    keys_file: Annotated[
        Path | None, typer.Option(help="Else serve.keys_file of the settings.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Make a bearer key. It is shown once; the file keeps its hash."""
    from serve_app.auth import new_key  # late: it brings FastAPI

    with faults_are_sentences():
        path = keys_file or _settings(config).serve.keys_file
        made = new_key(user)
        _append_entry(path, made.entry.model_dump())
        console.print(f"Added to {path}. The key, shown only now:")
        typer.echo(made.token)


def _append_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add to the file, whole or not at all: a server may be reading it."""
    from serve_app.auth import read_keys  # late: it brings FastAPI

    keys = [one.model_dump() for one in read_keys(path).keys] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:  # mode 0600
        new.write(yaml.safe_dump({"keys": [*keys, entry]}))
        new.flush()
        os.fsync(new.fileno())
    Path(new.name).replace(path)


@app.command("secrets-key")
def secrets_key() -> None:
    """Print a new key for the variable that agent.secrets.key_env names. It is kept nowhere."""
    typer.echo(new_secrets_key())


@app.command()
def chat(
    url: UrlOption = None,
    session: Annotated[str | None, typer.Option(help="Go on with this one.")] = None,
    model: Annotated[str | None, typer.Option(help="Any litellm name.")] = None,
    key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Talk to an agent in the terminal."""
    with faults_are_sentences(), _troupe(url, key, config) as troupe:
        raise typer.Exit(chat_in(troupe, console, session_id=session, model=model))


@app.command()
def demo(
    storage_dir: Annotated[
        Path, typer.Option(help="Where its journal, workspace and trajectory go.")
    ] = Path("var/demo"),
) -> None:
    """A small real task from end to end, with a script as the model; exit code 0 if it was done."""
    with faults_are_sentences(), stopping_on_signals():
        settings = _settings(None, host="127.0.0.1", port=0, dev=True, storage_dir=storage_dir)
        settings = _with_model(settings, SCRIPTED)
        cluster = Cluster(settings)
        with RunFile(settings.agent.storage_dir).held() as write:
            console.print(STARTING)
            try:
                with console.status("Starting…"):
                    running = cluster.start()
                write(_run_of(running, settings))
                code = demo_on(running.url, settings.agent.storage_dir, console)
            except KeyboardInterrupt:
                console.print("Interrupted.")
                code = 130
            finally:
                with console.status("Stopping…"):
                    cluster.stop()
        raise typer.Exit(code)


# What the commands share


def _settings(files: list[Path] | None, **options: Any) -> TroupeSettings:
    """The settings with the options over them, and absolute paths.

    Raises:
        SettingsInvalid
    """
    serve = {k: v for k, v in options.items() if v is not None and k != "storage_dir"}
    loaded = load_settings(files or ())
    storage_dir: Path = options.get("storage_dir") or loaded.agent.storage_dir
    try:
        checked = ServeSettings.model_validate(loaded.serve.model_dump() | serve)
    except ValidationError as cause:
        problems = [_about_option(error) for error in cause.errors(include_url=False)]
        raise SettingsInvalid("; ".join(problems)) from cause
    agent = loaded.agent.model_copy(update={"storage_dir": storage_dir})
    return with_absolute_paths(loaded.model_copy(update={"agent": agent, "serve": checked}))


def _about_option(error: Any) -> str:
    """One of pydantic's errors. What the files and the environment say was checked before, so a
    field in it was an option."""
    problem = error["msg"].removeprefix("Value error, ")
    return f"--{error['loc'][0]}: {problem}" if error["loc"] else problem


def _with_model(settings: TroupeSettings, model: str) -> TroupeSettings:
    agent = settings.agent.model_copy(update={"default_model": model})
    return settings.model_copy(update={"agent": agent})


def _running(file: RunFile) -> Run:
    run = file.read()
    if run is None:
        console.print(f"Nothing runs for {file.path.parent}. Start it with `troupe up`.")
        raise typer.Exit(1)
    return run


def _troupe(url: str | None, key: str | None, config: list[Path] | None) -> Troupe:
    if url is None:
        run = _running(RunFile(_settings(config).agent.storage_dir))
        if run.url is None:
            console.print(f"It is still starting (pid {run.pid}).")
            raise typer.Exit(1)
        url = run.url
    try:
        return Troupe(url, key)
    except httpx.InvalidURL as cause:
        raise typer.BadParameter(f"{url!r} is no URL ({cause})", param_hint="--url") from cause
    except UnicodeEncodeError as cause:
        raise typer.BadParameter("a key is plain ASCII", param_hint="--key") from cause


@contextmanager
def faults_are_sentences() -> Generator[None]:
    """What a person did wrong, or what is not there, is said in a line, with exit code 1."""
    try:
        yield
    except Fault as fault:
        console.print(f"[red]{escape(fault.detail)}[/]")
    except Problem as problem:
        console.print(refusal(problem))
    except Lost as lost:
        console.print(f"[red]{escape(str(lost))}[/]")
    except httpx.TransportError as error:
        where = error.request.url.copy_with(path="/")
        console.print(f"[red]No answer from {where}[/] ({type(error).__name__}).")
    else:
        return
    raise typer.Exit(1)


@contextmanager
def stopping_on_signals() -> Generator[None]:
    """SIGTERM is Ctrl-C here: both unwind what was started."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    signals_stop()
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def signals_stop() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    main()
