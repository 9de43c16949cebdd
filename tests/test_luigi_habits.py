"""Habits of Luigi's users, on the command line and in luigid: each works, or is refused with a sentence."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import requests

from embedded_supabase.files import wait_until
from embedded_supabase.ports import free_port
from pipeline.config import Settings
from tests import world
from tests.habits import habit
from tests.luigi_support import SharedLuigid, mailbox
from tests.runner import ForkServer, start_forked
from tests.services import (
    REPOSITORY,
    MakeDataset,
    RunLuigi,
    RunPipeline,
    after_target,
    asked_of_luigid,
    subprocess_environment,
)
from tests.test_worker import holding

BARE = ("luigi", "--module", "pipeline")
LOAD = (*BARE, "LoadBatch")
LOCAL = "--local-scheduler"

SETTINGS, SCHEDULER, WORKER = "Settings", "Scheduler", "Workers"
MAILS, TOOLS, CODES = "Mails, history, metrics", "Tools", "Failures and exit codes"


def loaded(settings: Settings) -> dict[str, tuple[int, int]]:
    """Return recognitions and shards of each batch that is done."""
    statement = "SELECT id, recognitions, shards FROM ingest.batches WHERE state = 'done' ORDER BY id"
    return {name: (count, shards) for name, count, shards in world.query(settings.database_url.reveal(), statement)}


def break_copies(settings: Settings, *, mend: bool = False) -> None:
    """Let every COPY of a menu fail, or no longer."""
    what = "DROP CONSTRAINT never" if mend else "ADD CONSTRAINT never CHECK (shard < 0)"
    world.query(settings.database_url.reveal(), f"ALTER TABLE raw.menus {what}")


# Settings


@habit(SETTINGS, "`[LoadBatch]` with task parameters in luigi.cfg", "works")
@habit(SETTINGS, "`--LoadBatch-limit 1`, the long form of a parameter", "works, and replaces what luigi.cfg has")
@habit(SETTINGS, "`${HOME}` and other variables in a value of luigi.cfg", "works")
@habit(SETTINGS, "`[pipeline]` in luigi.cfg", "works: the tuning of the loader")
def test_task_parameters_come_from_luigi_cfg_and_the_command_line(
    run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "luigi.cfg").write_text(
        "[LoadBatch]\nsource = ${PLACE}\nlimit = 4\n[pipeline]\nbatch_size = 2\n[core]\nlocal_scheduler = true\n"
    )
    place = {"PLACE": str(small_dataset(6))}
    assert run_luigi(*LOAD, "--batch-id", "b1", env=place).code == 0
    assert run_luigi(*LOAD, "--batch-id", "b2", "--LoadBatch-limit", "1", env=place).code == 0
    assert loaded(settings) == {"b1": (4, 2), "b2": (1, 1)}


@habit(SETTINGS, "luigi.toml in the working directory", "works, also without `LUIGI_CONFIG_PARSER`, in both forms")
@habit(SETTINGS, "`LUIGI_CONFIG_PARSER=toml`", "works")
@habit(SETTINGS, "`LUIGI_CONFIG_PATH=/etc/ours.toml`, or of a luigi.cfg", "works")
def test_luigi_toml_has_task_parameters_tuning_and_scheduler(
    run_luigi: RunLuigi, run_pipeline: RunPipeline, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    port = free_port()
    text = f"[LoadBatch]\nsource = '{small_dataset(6)}'\nlimit = 2\n[pipeline]\nbatch_size = 1\n"
    text += f"[core]\nscheduler_host = '127.0.0.1'\nscheduler_port = {port}\n"
    (workdir / "luigi.toml").write_text(text)
    ways: list[dict[str, str]] = [{}, {"LUIGI_CONFIG_PARSER": "toml"}]
    for number, env in enumerate(ways):
        done = run_luigi(*LOAD, "--batch-id", f"b{number}", env=env)
        assert done.code == 0, done.stderr
        expected = f"luigid does not answer at http://127.0.0.1:{port}/: using the local scheduler."
        assert after_target(done.stderr).endswith(f"[WARNING] {expected}\n")
        assert after_target(done.stderr).count("\n") == 1
    (workdir / "luigi.toml").rename(workdir / "ours.toml")
    assert run_luigi(*LOAD, "--batch-id", "b2", env={"LUIGI_CONFIG_PATH": str(workdir / "ours.toml")}).code == 0
    (workdir / "ours.toml").rename(workdir / "luigi.toml")
    source = ("--source", small_dataset(6), "--limit", "2", "--force")
    assert run_pipeline("load", "--batch-id", "b3", *source).returncode == 0
    assert loaded(settings) == {f"b{number}": (2, 2) for number in range(4)}


@habit(SETTINGS, "luigi.toml beside luigi.cfg", "refused: `Luigi does not read the luigi.toml in this folder.`")
def test_a_luigi_toml_beside_a_luigi_cfg_is_refused(run_luigi: RunLuigi, workdir: Path) -> None:
    for name in ("luigi.cfg", "luigi.toml"):
        (workdir / name).write_text("[pipeline]\nthread_count = 3\n")
    done = run_luigi(*LOAD, LOCAL)
    assert done.code == 40
    assert done.stderr.startswith("Error: Luigi does not read the luigi.toml in this folder.\nHint: Set LUIGI_CONFIG_")


@habit(SETTINGS, "`--help`", "works: the parameters of the task")
@habit(SETTINGS, "`--help-all`", "works: those of all tasks as well")
@habit(
    SETTINGS,
    "a task name with a typing error, a value that is no date or number",
    "fails in Luigi, for any task: a traceback whose end names the nearest task, or the value",
)
def test_the_help_of_luigi_shows_the_parameters(run_luigi: RunLuigi) -> None:
    shown = run_luigi(*LOAD, "--help")
    assert shown.code == 0
    assert re.search(r"--max-rejects MAX_REJECTS\s+hold the batch", shown.stdout)
    assert "--coordinates" not in shown.stdout
    assert re.search(r"--LoadQwen-coordinates \S+\s+what the numbers", run_luigi(*LOAD, "--help-all").stdout)
    for arguments, told in (
        ((*BARE, "LoadBach"), r"No task LoadBach. Did you mean:\nLoadBatch\n"),
        (("luigi", "--module", "luigi.tools.range", "RangeDailyy"), r"Did you mean:\nRangeDaily\n"),
        ((*BARE, "LoadNight", "--date", "soon"), "'soon' does not match format '%Y-%m-%d'\n$"),
    ):
        wrong = run_luigi(*arguments)
        assert wrong.code != 0
        assert re.search(told, wrong.stderr), wrong.stderr


@habit(SETTINGS, "a required parameter that is missing, as `LoadNight` without `--date`", "refused in one sentence")
@pytest.mark.parametrize(("task", "missing"), [("LoadNight", "date"), ("ResetBatch", "batch-id")])
def test_a_missing_parameter_is_named_in_a_sentence(run_luigi: RunLuigi, task: str, missing: str) -> None:
    done = run_luigi(*BARE, task)
    hint = f"Hint: `luigi --module pipeline {task} --help` shows what there is.\n"
    assert (done.code, done.stderr) == (40, f"Error: {task} needs --{missing}.\n{hint}")


@habit(SETTINGS, "our luigi.cfg under other programs of Luigi", "works without a warning")
def test_luigi_does_not_warn_of_the_settings_in_our_luigi_cfg(run_luigi: RunLuigi, workdir: Path) -> None:
    text = (REPOSITORY / "luigi.cfg").read_text(encoding="utf-8")
    (workdir / "luigi.cfg").write_text(text, encoding="utf-8")
    (workdir / "theirs.py").write_text("import luigi\nclass Theirs(luigi.WrapperTask):\n    pass\n", encoding="utf-8")
    done = run_luigi("luigi", "--module", "theirs", "Theirs", LOCAL)
    assert (done.code, "Warning" in done.stderr) == (0, False), done.stderr
    (workdir / "luigi.cfg").write_text(text.replace("[core]\n", "[core]\nrpc_retry_wait = 1\n"), encoding="utf-8")
    done = run_luigi(*LOAD, LOCAL, "--source", "nowhere")
    assert (done.code, "Warning" in done.stderr) == (40, False), done.stderr


@habit(SETTINGS, "`[core] no_configure_logging = false`", "works: Luigi's own lines appear as well")
@habit(SETTINGS, "`--log-level INFO`", "works: every step is logged, as with `--verbose`")
@habit(SETTINGS, "`--logging-conf-file`", "works with `no_configure_logging = false`, else refused")
def test_logs_are_as_luigi_is_told(
    run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    load = (*LOAD, "--source", small_dataset(3), LOCAL)
    told = run_luigi(*load, "--batch-id", "b1", "--log-level", "INFO").stderr
    assert "[INFO] upload: shard 1: 3 recognitions, 0 rejects" in told
    log = workdir / "log.conf"
    log.write_text(
        "[loggers]\nkeys=root\n[handlers]\nkeys=one\n[formatters]\nkeys=\n[logger_root]\nlevel=INFO\nhandlers=one\n"
        f"[handler_one]\nclass=FileHandler\nargs=('{workdir}/luigi.log',)\n"
    )
    refused = run_luigi(*load, "--batch-id", "b2", "--logging-conf-file", log)
    assert refused.code == 40
    assert "Error: The file of logging_conf_file would not be used: the pipeline configures logging." in refused.stderr
    (workdir / "luigi.cfg").write_text("[core]\nno_configure_logging = false\n")
    assert "INFO: Done scheduling tasks" in run_luigi(*load, "--batch-id", "b2").stderr
    assert run_luigi(*load, "--batch-id", "b3", "--logging-conf-file", log).code == 0
    assert "Done scheduling tasks" in (workdir / "luigi.log").read_text()


# Scheduler


@habit(SCHEDULER, "`--local-scheduler`, or `[core] local_scheduler`", "works")
@habit(SCHEDULER, "no luigid", "works: a scheduler of its own, which Luigi's command says")
def test_without_luigid_a_load_has_a_scheduler_of_its_own(run_luigi: RunLuigi, small_dataset: MakeDataset) -> None:
    load = (*LOAD, "--source", small_dataset(3), "--batch-id", "b1")
    done = run_luigi(*load, "--scheduler-port", str(free_port()))
    assert (done.code, done.stderr.count("using the local scheduler")) == (0, 1)
    again = run_luigi(*load, LOCAL)
    assert (again.code, after_target(again.stderr)) == (0, "")


@habit(SCHEDULER, "`--scheduler-url`", "works; the run says which luigid it uses")
@habit(SCHEDULER, "`--scheduler-host` and `--scheduler-port`", "works, also where luigi.cfg has a `scheduler_url`")
@habit(MAILS, "luigid's Prometheus collector (`metrics_collector = prometheus`)", "works")
@habit(MAILS, "`[task_history]` of luigid in PostgreSQL", "works, with `postgresql+psycopg2://`")
@habit(TOOLS, "`luigi-grep --prefix`, `--status`", "works")
def test_the_named_luigid_is_used_and_knows_what_was_done(
    service: SharedLuigid, run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "luigi.cfg").write_text(f"[core]\nscheduler_url = http://127.0.0.1:{free_port()}\n")
    where = ("--scheduler-host", "127.0.0.1", "--scheduler-port", service.port)
    for number, options in enumerate((where, service.options)):
        done = run_luigi(*LOAD, "--source", small_dataset(3), "--batch-id", f"grep{number}", "--force", *options)
        assert (done.code, after_target(done.stderr)) == (0, "")
        project = re.search(rf"^Scheduler: luigid at {service.url}/?, where this project is (\w+)$", done.stderr, re.M)
        assert project is not None, done.stderr
        found = asked_of_luigid(service.url, "task_list", status="DONE", upstream_status="", search=f"grep{number}")
        assert {one["params"]["supabase_project"] for one in found.values()} == {project[1]}
        assert {one["params"].get("part") for one in found.values()} == {
            None,
            "shard 1 of 1, upload",
            "shard 1 of 1, copy",
        }
    grepped = run_luigi("luigi-grep", "--scheduler-port", service.port, "--prefix", "UploadShard_grep1")
    assert "DONE, Dependencies" in grepped.stdout
    assert (
        run_luigi("luigi-grep", "--scheduler-port", service.port, "--status", "done").stdout.count("UploadShard") >= 2
    )
    history = "SELECT count(*) FROM tasks t JOIN task_events e ON e.task_id = t.id WHERE e.event_name = 'DONE'"
    assert world.query(service.history, f"{history} AND t.name = 'UploadShard'")[0][0] >= 2
    assert re.search(r'^luigi_task_done_total\{family="UploadShard"\} [2-9]', metrics(service), re.MULTILINE)


def metrics(service: SharedLuigid) -> str:
    with requests.Session() as session:
        session.trust_env = False
        return session.get(f"{service.url}/metrics", timeout=10).text


@habit(MAILS, "`[task_history]` of luigid in SQLite", "fails in Luigi 3.8 with SQLAlchemy 2, whose SQL it predates")
def test_the_history_in_sqlite_fails_in_luigi_itself(run_luigi: RunLuigi, workdir: Path) -> None:
    (workdir / "luigi.cfg").write_text(f"[task_history]\ndb_connection = sqlite:///{workdir}/history.db\n")
    (workdir / "history.py").write_text("from luigi.db_task_history import DbTaskHistory\nDbTaskHistory()\n")
    failed = run_luigi("script", "history.py")
    assert failed.code == 70
    assert "ObjectNotExecutableError: Not an executable object: 'PRAGMA" in failed.stderr


# Tools


@habit(TOOLS, "`UploadShard` or another task of a batch alone", "works")
@habit(TOOLS, "`luigi-deps`", "works, with the shards of a batch that is known")
@habit(TOOLS, "`luigi-deps-tree`", "works, with the shards of a batch that is known, and what is done")
def test_the_tools_show_the_shards_of_a_known_batch(
    run_luigi: RunLuigi, small_dataset: MakeDataset, settings: Settings
) -> None:
    load = ("--module", "pipeline", "LoadBatch", "--source", small_dataset(4), "--batch-id", "b1")
    sharded = {"PIPELINE_BATCH_SIZE": "2"}
    before = run_luigi("luigi-deps", *load)
    assert re.findall(r"TASK: (\w+)", before.stdout) != []
    assert "Shard" not in before.stdout
    break_copies(settings)
    assert run_luigi("luigi", *load, LOCAL, env=sharded).code == 30
    shown = run_luigi("luigi-deps", *load).stdout
    assert sorted(re.findall(r"TASK: (\w+Shard)\(.*shard=(\d)", shown)) == [
        ("CopyShard", "1"),
        ("CopyShard", "2"),
        ("UploadShard", "1"),
        ("UploadShard", "2"),
    ]
    tree = states(run_luigi("luigi-deps-tree", *load).stdout)
    assert tree >= {("CopyShard", "PENDING"), ("DiscoverBatch", "COMPLETE")}
    assert loaded(settings) == {}
    break_copies(settings, mend=True)
    one = ("--module", "pipeline", "UploadShard", "--batch-id", "b1", "--shard", "2", LOCAL, "--no-lock")
    assert run_luigi("luigi", *one).code == 0
    assert ("UploadShard", "COMPLETE") in states(run_luigi("luigi-deps-tree", *load).stdout)
    assert run_luigi("luigi", *load, LOCAL, env=sharded).code == 0
    families = ("LoadBatch", "TransformBatch", "CopyShard", "UploadShard", "DiscoverBatch")
    assert states(run_luigi("luigi-deps-tree", *load).stdout) == {(family, "COMPLETE") for family in families}


def states(tree: str) -> set[tuple[str, str]]:
    """Return the tasks in the output of luigi-deps-tree, each with its state."""
    return set(re.findall(r"\[(\w+)-\{[^}]*\} \(\x1b\[9\dm(\w+)", tree))


# Workers


@habit(WORKER, "`--workers 3`", "works: processes, each with shards of its own")
@habit(WORKER, "`--worker-timeout`, `[worker] timeout`", "works: a process for each task, so that it can be ended")
@habit(WORKER, "`[worker] force_multiprocessing`", "works")
@habit(WORKER, "`[worker] keep_alive`", "works")
@habit(WORKER, "`--no-lock`", "works; the lock of a batch is in the database, and not this one")
def test_workers_and_their_options(
    run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    options = ("cache_task_completion", "force_multiprocessing", "keep_alive")
    (workdir / "luigi.cfg").write_text("\n".join(["[worker]", *(f"{option} = true" for option in options)]))
    load = (*LOAD, "--source", small_dataset(6), LOCAL, "--no-lock")
    sharded = {"PIPELINE_BATCH_SIZE": "2"}
    done = run_luigi(*load, "--batch-id", "b1", "--workers", "3", "--parallel-scheduling", env=sharded)
    assert (done.code, after_target(done.stderr)) == (0, "")
    (workdir / "luigi.cfg").unlink()
    done = run_luigi(*load, "--batch-id", "b2", "--force", "--worker-timeout", "60", env=sharded)
    assert (done.code, after_target(done.stderr)) == (0, "")
    assert loaded(settings) == {"b1": (6, 3), "b2": (6, 3)}


@habit(
    WORKER,
    "`--parallel-scheduling`, `[worker] cache_task_completion`",
    "works, with nothing to gain: one statement reads all markers, and Luigi's processes for it are not started",
)
def test_after_a_kill_no_process_has_the_lock(
    fork_server: ForkServer,
    workdir: Path,
    tmp_path: Path,
    small_dataset: MakeDataset,
    settings: Settings,
    run_luigi: RunLuigi,
) -> None:
    (workdir / "luigi.cfg").write_text("[worker]\ncache_task_completion = true\n[core]\nparallel_scheduling = true\n")
    load = ("--module", "pipeline", "LoadBatch", "--source", str(small_dataset(4)), LOCAL, "--batch-id", "b1")
    env = subprocess_environment({"PIPELINE_BATCH_SIZE": "2"})
    output = tmp_path / "output"
    output.mkdir()
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with holding(settings.database_url.reveal(), 1):
        running = start_forked(fork_server, output, workdir, load, env, "luigi")
        assert wait_until(lambda: world.query(settings.database_url.reveal(), waiting)[0][0] > 0, 60)
        running.signal(signal.SIGKILL, group=False)
        running.finish()
    again = run_luigi("luigi", *load, env=env)
    assert again.code == 0, again.stderr
    assert loaded(settings) == {"b1": (4, 2)}


@habit(WORKER, "`--take-lock`", "refused: the lock of a batch is in the database")
@habit(WORKER, "`--assistant`", "refused: it would take tasks of others; `pipeline worker` takes those of its project")
def test_options_that_contradict_lock_or_project_are_refused(run_luigi: RunLuigi, small_dataset: MakeDataset) -> None:
    done = run_luigi(*LOAD, "--source", small_dataset(3), "--batch-id", "b1", LOCAL, "--assistant")
    assert (done.code, done.stdout) == (40, "")
    assert "Error: --assistant would take any task that luigid has" in done.stderr
    assert "pipeline worker" in done.stderr
    done = run_luigi(*LOAD, "--source", small_dataset(3), "--batch-id", "b1", LOCAL, "--take-lock")
    assert (done.code, done.stdout) == (40, "")
    assert "Error: --take-lock would do nothing: the lock of a batch is in the database." in done.stderr


@habit(WORKER, "SIGUSR1", "works: no further task is taken, and the next run goes on")
@habit(CODES, "Ctrl-C, SIGTERM", "works: exit code 130, and the next run goes on")
@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_load_that_is_told_to_stop_is_resumed(
    number: int,
    fork_server: ForkServer,
    workdir: Path,
    tmp_path: Path,
    small_dataset: MakeDataset,
    settings: Settings,
    run_luigi: RunLuigi,
) -> None:
    load = ("--module", "pipeline", "LoadBatch", "--source", str(small_dataset(30)), LOCAL, "--batch-id", "b1")
    env = subprocess_environment({"PIPELINE_BATCH_SIZE": "1", "PIPELINE_THREAD_COUNT": "1"})
    output = tmp_path / "output"
    output.mkdir()
    running = start_forked(fork_server, output, workdir, load, env, "luigi")
    marked = "SELECT count(*) FROM ingest.batch_state WHERE step = 'upload'"
    assert wait_until(lambda: world.query(settings.database_url.reveal(), marked)[0][0] > 0, 60)
    running.signal(number, group=False)
    ended = running.finish()
    assert ended.code == (25 if number == signal.SIGUSR1 else 130), ended.stderr
    assert "To go on: luigi --module pipeline LoadBatch --batch-id b1" in ended.stderr
    assert run_luigi("luigi", *load).code == 0
    assert loaded(settings) == {"b1": (30, 30)}


# Failures


@habit(CODES, "`[retcode]`", "works; without it, every failure has the codes of the guide, and none is 0")
@habit(MAILS, "`[email]` and `[smtp]`", "works: a mail for each task that failed, without keys and passwords")
@habit(MAILS, "`batch_emails` and `[batch_notifier]` of luigid", "works, as `[batch_email]`: Luigi 3.8 reads no other")
def test_a_failed_task_has_a_mail_and_the_code_of_the_user(
    service: SharedLuigid, run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    load = (*LOAD, "--source", small_dataset(3), "--batch-id", "fails", *service.options)
    break_copies(settings)
    with mailbox() as box:
        (workdir / "luigi.cfg").write_text(f"[retcode]\ntask_failed = 77\n{box.settings}")
        assert run_luigi(*load).code == 77
        told = [mail for mail in box.mails if mail.startswith("Luigi: CopyShard(batch_id=fails")]
        assert len(told) == 1
    assert "\n\nPostgreSQL: new row" in told[0]
    (workdir / "luigi.cfg").unlink()
    assert run_luigi(*load).code == 30
    assert wait_until(lambda: any("CopyShard" in mail for mail in service.box.mails), 20)
    for text in (*box.mails, *service.box.mails):
        assert settings.key.reveal() not in text
        assert settings.database_url.reveal() not in text


@habit(CODES, "`retry_count` and `disable_*` of a task or of luigid", "works: a disabled task is not run, exit code 25")
@habit(CODES, "the button of the visualiser that enables a disabled task again", "works")
@habit(CODES, "the button that pauses luigid", "works: no task is run, exit code 25")
@habit(CODES, "the button that marks a task as done", "works, but the database decides: the load runs what is not done")
def test_the_buttons_of_the_visualiser(
    service: SharedLuigid, run_luigi: RunLuigi, workdir: Path, small_dataset: MakeDataset, settings: Settings
) -> None:
    (workdir / "mine.py").write_text("import pipeline\npipeline.CopyShard.retry_count = 1\n")
    given = ("--batch-id", "off", "--source", small_dataset(3), *service.options)
    load = ("luigi", "--module", "mine", "LoadBatch", *given)
    break_copies(settings)
    assert run_luigi(*load).code == 30
    [disabled] = asked_of_luigid(service.url, "task_list", status="DISABLED", upstream_status="", search="off")
    break_copies(settings, mend=True)
    assert run_luigi(*load).code == 25
    asked_of_luigid(service.url, "pause")
    asked_of_luigid(service.url, "re_enable_task", task_id=disabled)
    assert run_luigi(*load).code == 25
    asked_of_luigid(service.url, "unpause")
    asked_of_luigid(service.url, "mark_as_done", task_id=disabled)
    assert run_luigi(*load).code == 0
    assert loaded(settings) == {"off": (3, 1)}


@pytest.mark.slow
@habit(WORKER, "the number of processes, changed in the visualiser", "works: more processes take shards from then on")
def test_the_visualiser_changes_the_number_of_processes(
    service: SharedLuigid,
    fork_server: ForkServer,
    workdir: Path,
    tmp_path: Path,
    small_dataset: MakeDataset,
    settings: Settings,
) -> None:
    load = ("--module", "pipeline", "LoadBatch", "--source", str(small_dataset(12)), "--batch-id", "b1")
    env = subprocess_environment({"PIPELINE_BATCH_SIZE": "1", "PIPELINE_THREAD_COUNT": "1"})
    output = tmp_path / "output"
    output.mkdir()

    def processes() -> list[int]:
        found = asked_of_luigid(service.url, "worker_list", include_running=False)
        return [one.get("workers") for one in found if "batch=b1" in one["name"]]

    with holding(settings.database_url.reveal(), *range(1, 13)) as held:
        running = start_forked(fork_server, output, workdir, (*load, *service.options), env, "luigi")
        assert wait_until(lambda: processes() == [1], 60)
        [worker] = [one for one in asked_of_luigid(service.url, "worker_list") if "batch=b1" in one["name"]]
        asked_of_luigid(service.url, "set_worker_processes", worker=worker["name"], n=2)
        assert wait_until(lambda: processes() == [2], 60)
        for shard in range(1, 13):
            held.let_go(shard)
        ended = running.finish()
    assert ended.code == 0, ended.stderr
    workers = "SELECT count(DISTINCT worker) FROM ingest.batch_state WHERE step = 'upload'"
    assert world.query(settings.database_url.reveal(), workers)[0][0] > 1
