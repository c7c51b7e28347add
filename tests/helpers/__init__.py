"""What several test modules need: plain functions and constants; fixtures stand in the conftest.py of their folder."""

import pytest

pytest.register_assert_rewrite("helpers.runs", "helpers.models", "helpers.emoji", "helpers.hub", "helpers.faults")
