"""Refuses an ordinary install: it would put packages called `model` and `scripts` beside everybody else's.

Everything else about the project stands in pyproject.toml.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class EditableOnly(bdist_wheel):
    def run(self) -> None:
        raise SystemExit(
            "minimind-vlm is a project to work in, not a library: an ordinary install would put packages called "
            "`model` and `scripts` beside everybody else's. Use `pip install -e .` in a clone"
        )


setup(cmdclass={"bdist_wheel": EditableOnly})
