"""`jaxqkv.cache`: compiled programs that the next process reads."""

import jax
import pytest
from helpers.processes import fork

import jaxqkv
from jaxqkv.errors import JaxqkvError

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def _as_before():
    kept = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in kept.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_the_folder(monkeypatch, tmp_path):
    """The command's own, one that is given, and the one that JAX was told of."""
    monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path / "own"))
    assert jaxqkv.cache() == tmp_path / "own" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own" / "xla")
    assert jaxqkv.cache(tmp_path / "given") == tmp_path / "given"
    assert jaxqkv.cache() == tmp_path / "given"
    assert (tmp_path / "given").is_dir()
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    jaxqkv.cache()
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"


def test_programs_are_kept_after_others_were(tmp_path):
    """In a second folder too, and after a program that was compiled before the first call."""
    jax.jit(lambda x: x + 3)(2.0)
    for name in ("one", "two"):
        folder = jaxqkv.cache(tmp_path / name)
        jax.jit(lambda x: x * 7)(2.0)  # another function each time
        assert any(folder.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(JaxqkvError, match=r"compiled programs are not kept: .*file/xla: Not a directory$"):
        jaxqkv.cache(tmp_path / "file" / "xla")


@pytest.mark.slow
def test_another_process_reads_the_programs(tmp_path):
    code = """
import collections, jax, numpy as np, jaxqkv
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **about: events.update([event.rpartition("/")[2]]))
print(jaxqkv.cache())
print(jaxqkv.kernels.moments(np.arange(5))[0], events["cache_hits"], events["cache_misses"])
"""
    seen = []
    for _ in range(2):
        done = fork(code, env={"JAXQKV_CACHE": str(tmp_path)}).completed()
        assert done.returncode == 0, done.stderr
        folder, line = done.stdout.splitlines()
        assert folder == str(tmp_path / "xla")
        seen.append(line.split())
    (mean, hits, misses), second = seen
    assert (mean, hits) == ("2.0", "0")
    assert int(misses) > 0
    assert second == [mean, misses, "0"]
