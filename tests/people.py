"""People who work on recognitions: what they reference stays."""

from __future__ import annotations

from dataclasses import dataclass

from tests import world

NOTES = """
    CREATE TABLE public.notes (item bigint REFERENCES public.initial_tray_items (id), recognition_id bigint NOT NULL)
"""
#: How people begin to work on a recognition, and end it.
WORK = {
    "app": (
        "INSERT INTO public.validation_work_log (recognition_id) VALUES ({0})",
        "DELETE FROM public.validation_work_log WHERE recognition_id = {0}",
    ),
    "own": (
        "INSERT INTO public.notes SELECT id, recognition_id FROM public.initial_tray_items WHERE recognition_id = {0}",
        "DELETE FROM public.notes WHERE recognition_id = {0}",
    ),
}


@dataclass(frozen=True)
class People:
    """People who work in a project."""

    dsn: str
    project: str

    def begin(self, number: int) -> None:
        world.query(self.dsn, WORK[self.project][0].format(number))

    def end(self, number: int) -> None:
        world.query(self.dsn, WORK[self.project][1].format(number))

    def begin_at(self, step: str, number: int) -> None:
        """Let work begin as soon as a shard of a batch has its marker of a step, once."""
        world.query(
            self.dsn,
            f"""
            CREATE FUNCTION public.begin_work() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NOT EXISTS (SELECT FROM public.begun) THEN
                    INSERT INTO public.begun VALUES (true);
                    {WORK[self.project][0].format(number)};
                END IF;
                RETURN NULL;
            END $$;
            CREATE TABLE public.begun (begun boolean);
            CREATE TRIGGER begin_work AFTER INSERT ON ingest.batch_state FOR EACH ROW
                WHEN (NEW.step = '{step}' AND NEW.shard = 1) EXECUTE FUNCTION public.begin_work()""",
        )
