# SPDX-License-Identifier: Apache-2.0
"""Signatures of requests to S3, against botocore's own."""

import hashlib
from datetime import UTC, datetime, timedelta
from unittest.mock import patch
from urllib.parse import quote, urlencode

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given
from hypothesis import strategies as st

from acestep_consumer.storage.s3.signature import Signer, encode_query

NOW = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
WORDS = st.text("abcXYZ019 -_.~/+=&%?ü", max_size=12)
HOSTS = ["http://127.0.0.1:9000", "http://store", "https://store:443", "https://Store.Example:8443", "http://[::1]:80"]


@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "DELETE"]),
    host=st.sampled_from(HOSTS),
    key=WORDS,
    headers=st.dictionaries(
        st.sampled_from(["Content-Type", "x-amz-meta-seed", "If-None-Match", "Range"]),
        st.text("ab  1*/;=", min_size=1).filter(str.strip),
    ),
    query=st.dictionaries(st.sampled_from(["partNumber", "uploadId", "a b"]), WORDS),
    body=st.binary(max_size=16),
    token=st.none() | st.just("t/o+k="),
    later=st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=3)),
)
def test_every_request_is_signed_as_botocore_signs_it(
    method: str,
    host: str,
    key: str,
    headers: dict[str, str],
    query: dict[str, str],
    body: bytes,
    token: str | None,
    later: timedelta,
) -> None:
    keys, url, sha256 = ReadOnlyCredentials("id", "secret", token), f"{host}/b/{quote(key, safe='/~')}", digest(body)
    signer = Signer(keys, "eu-west-3")
    for now in (NOW, NOW + later):
        whole = f"{url}?{urlencode(query, quote_via=quote, safe='~')}" if query else url
        theirs = AWSRequest(method, whole, headers=headers, data=body)
        with patch("botocore.auth.get_current_datetime", return_value=now):
            S3SigV4Auth(keys, "s3", "eu-west-3").add_auth(theirs)
        assert signer.sign(method, url, sha256, headers, query, now=now) == dict(theirs.headers.items())


def test_a_query_is_sent_in_the_order_and_encoding_that_is_signed() -> None:
    assert encode_query({"uploadId": "a/b~c d", "partNumber": "7"}) == "partNumber=7&uploadId=a%2Fb~c%20d"


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
