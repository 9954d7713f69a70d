import pytest
import torch

from starseg.engine.launch import refuse_without_compiler
from starseg.errors import UserError


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train.compile: .* C\+\+ compiler no-such-compiler, which is not installed"):
        refuse_without_compiler(torch.device("cpu"))
