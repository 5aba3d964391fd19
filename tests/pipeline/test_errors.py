"""What is said to people holds no secret, whatever form it stands in."""

from __future__ import annotations

import time

import pytest

from pipeline.errors import did_you_mean, masked

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"http://ads:{SECRET}@host/api failed",
        f"https://:{SECRET}@host",
        f"https://{SECRET}@host/repo.git is away",
        f"postgresql://ads:{SECRET}/x@db/mlflow",
        f"postgresql://ads:x/{SECRET}@db/mlflow",
        f"postgresql://ads:12345/{SECRET}@db/mlflow",
        f"mysql+pymysql://ads:x@{SECRET}@db/mlflow",
        f"mysql+pymysql://ads:x@y/{SECRET}@db/mlflow",
        f"postgresql://ads:a {SECRET} b@db/mlflow",
        f"postgresql://ads:it's {SECRET}@db/mlflow",
        f"postgresql://host/db?user=u&password={SECRET}&x=1",
        f"postgresql://host/db?password=a {SECRET}&x=1",
        f"postgresql://host/db?password=a/{SECRET}",
        f"https://host/x?token={SECRET} is away",
        f"https://host/x?access_token={SECRET}",
        f"https://host/x?sig={SECRET}&se=2026",
        f"https://host/x?X-Amz-Signature={SECRET}&X-Amz-Security-Token={SECRET}",
        f"mssql+pyodbc:///?odbc_connect=DRIVER={{x}};UID=u;PWD={SECRET} 1;x=1",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7Bx%7D%3BPWD%3D{SECRET}",
        f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={SECRET};EndpointSuffix=x",
        f"first http://h:80/a, then 'http://u:{SECRET}@h' and \"postgresql://u:{SECRET}@h\"",
        f"http://u:\n1, http://u:{SECRET}@h",
    ],
)
def test_secrets_are_masked_in_every_form(text: str) -> None:
    assert SECRET not in masked(text)
    assert masked(masked(text)) == masked(text)


def test_values_of_secret_variables_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET[:7])
    assert masked(f"Bearer {SECRET}, {SECRET[:7]}") == "Bearer ***, ***"


@pytest.mark.parametrize("piece", ["a", "a://b:", "a://b:c", "password=", "://", "@", "odbc_connect=a", "sig", "a:@ "])
def test_a_megabyte_is_masked_in_a_moment(piece: str) -> None:
    begun = time.process_time()
    masked(piece * ((1 << 20) // len(piece)))
    assert time.process_time() - begun < 2


def test_the_nearest_to_a_megabyte_of_name_is_found_in_a_moment() -> None:
    begun = time.process_time()
    assert "known" in did_you_mean("ab" * (1 << 19), ["clicks", "ab" * 2000])
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/a@b is away",
        "http://host:5000 is away; ask ads@example.com",
        "postgresql://ads@db/mlflow",
        "models:/ads@champion",
        "hf://datasets/org/name@0123/raw",
        "sqlite:////runs/mlflow.db?timeout=5",
        "serving.batch_tokens=2048 key.sub=value signal=9",
        "write key.sub=value, got 'name@x': s3://bucket/a:b",
    ],
)
def test_what_is_no_secret_is_left_as_it_stands(text: str) -> None:
    assert masked(text) == text
