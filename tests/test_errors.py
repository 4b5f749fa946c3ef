import pickle

import pytest

from tpllm.errors import UnknownSettingError, WorkerError, refuse_unknown_settings


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_an_unknown_setting_is_caught_as_either_kind_of_error(kind):
    with pytest.raises(kind, match="f has no setting 'sed'; did you mean 'seed'"):
        refuse_unknown_settings("f", ["sed"], ["seed", "dtype"])


def test_a_setting_like_no_other_gets_the_whole_list():
    with pytest.raises(UnknownSettingError, match="it has dtype, seed"):
        refuse_unknown_settings("f", ["zzzz"], ["seed", "dtype"])


def test_known_settings_pass():
    refuse_unknown_settings("f", ["seed"], ["seed", "dtype"])


def test_a_worker_error_keeps_its_rank_when_pickled():
    error = pickle.loads(pickle.dumps(WorkerError("worker rank 3 ended", rank=3)))
    assert (str(error), error.rank) == ("worker rank 3 ended", 3)
