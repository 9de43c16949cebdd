"""Packaging: the distribution `pipeline`, with its SQL and migrations inside the wheel."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements() -> list[str]:
    """Return the requirements of requirements.txt without their comments."""
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


setup(
    name="pipeline",
    version="0.1.0",
    description="Loads datasets of canteen-tray photos into Supabase, in batches, exactly once",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    install_requires=requirements(),
    packages=[*find_packages(include=["pipeline", "pipeline.*"]), "pipeline.migrations"],
    # The migrations live where the Supabase CLI looks for them; a wheel carries them as a data-only package.
    package_dir={"pipeline.migrations": "supabase/migrations"},
    package_data={
        "pipeline": ["py.typed"],
        "pipeline.sql": ["*.sql"],
        "pipeline.migrations": ["*.sql"],
        "pipeline.report": ["*.css", "*.html", "*.js"],
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
