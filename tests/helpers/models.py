"""Models, folders and runs that the tests of models share in a module, as fixtures: `gpt2 = models.gpt2`."""

import pytest
from conftest import CONFIGS, GPT2, random_ids, write_folder

import jaxqkv
from helpers.oracles import EVERYTHING

# Tests whose subject is another take one batch and one set of fields, and so one compiled block: with `hidden`, every
# layer's stream goes on.
IDS = random_ids(GPT2, 2, 11)
ALL = EVERYTHING | {"hidden"}


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / config.model_type, config)


@pytest.fixture(scope="module")
def model(folder):
    return jaxqkv.load(folder)


@pytest.fixture(scope="module")
def whole(model):
    """Returns all intermediates of `IDS`."""
    return model.run(IDS, capture=ALL)


# Of code that does not know the architecture.
@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "gpt2", GPT2)


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return jaxqkv.load(gpt2_folder)


@pytest.fixture(scope="module")
def gpt2_whole(gpt2):
    """Returns all intermediates of `IDS`."""
    return gpt2.run(IDS, capture=ALL)
