"""Where an environment's locks are kept: the journal's database, or DynamoDB or S3 for teams without a shared one."""

from __future__ import annotations

import email.utils
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from runbooks.errors import Problem
from runbooks.locks import Book, Store, T

if TYPE_CHECKING:
    from runbooks.journal import Journal

LEAST_S = 6.0
"""Seconds of the shortest lease in a store whose clock shows whole seconds."""
PATIENCE_S = 20.0
"""How long a change is tried again because others change the book too."""


def open_store(journal: Journal, where: str = "", aws: Mapping[str, Any] | None = None) -> Store:
    """The store that the inventory's ``runbook_locks`` names; the journal's database when it names none.

    aws: options of the AWS client (endpoint_url, region_name, keys). Raises Problem when the name is of no store.
    """
    parts = urlsplit(where)
    if not where:
        return JournalStore(journal)
    if parts.scheme == "dynamodb" and parts.netloc and not parts.path.strip("/"):
        return DynamoStore(where, parts.netloc, journal.environment, _client("dynamodb", aws))
    if parts.scheme == "s3" and parts.netloc:
        key = "/".join(p for p in (parts.path.strip("/"), f"{journal.environment}.json") if p)
        return S3Store(where, parts.netloc, key, _client("s3", aws))
    raise Problem(
        f"runbook_locks of environment {journal.environment} is {where!r}, which is neither dynamodb://TABLE nor "
        "s3://BUCKET/PREFIX",
        code="lock-store-unknown",
        next_command="grep -rn runbook_locks inventories",
    )


class JournalStore:
    """The book beside the journal, changed in one transaction of its database."""

    def __init__(self, journal: Journal) -> None:
        self.where, self._journal = "the journal's database", journal

    def another(self) -> JournalStore:
        journal = self._journal
        return JournalStore(type(journal)(journal.location, journal.environment, journal.directory))

    def close(self) -> None:
        self._journal.close()

    def read(self) -> tuple[Book, float]:
        return self.change(lambda book, now: (book, (book, now)))

    def change(self, plan: Callable[[Book, float], tuple[Book, T]]) -> T:
        def planned(document: dict[str, Any] | None, now: float) -> tuple[dict[str, Any] | None, T]:
            before = Book.of(document)
            after, result = plan(before, now)
            return (None if after == before else after.document()), result

        return self._journal.change_book(planned)


class _Conditional(ABC):
    """A document that is replaced only when it is the one that was read; the clock is that of the server's answers.

    The server tells the time in whole seconds, so a lease may look a second shorter to others than it is. Its holder
    gives up a third of it earlier: leases in these stores last at least LEAST_S.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def another(self) -> Self:
        return self  # Its client may be used by several threads.

    def close(self) -> None:
        return None  # Nothing is open between two questions.

    @abstractmethod
    def _get(self) -> tuple[dict[str, Any] | None, Any, float]:
        """The document, its version, and the server's clock."""

    @abstractmethod
    def _put(self, document: dict[str, Any], version: Any) -> bool:
        """Whether it was replaced: False when it is not of that version any more."""

    def read(self) -> tuple[Book, float]:
        with _Answers(self.where):
            document, _, now = self._get()
        return Book.of(document), now

    def change(self, plan: Callable[[Book, float], tuple[Book, T]]) -> T:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with _Answers(self.where):
                document, version, now = self._get()
            before = Book.of(document)
            after, result = plan(before, now)
            if after == before:
                return result
            with _Answers(self.where):
                if self._put(after.document(), version):
                    return result
            if time.monotonic() > deadline:
                raise Problem(
                    f"The locks in {self.where} are changed by others all the time: none of our changes in "
                    f"{PATIENCE_S:g} s",
                    code="lock-store-busy",
                    next_command="runbook runs",
                )
            time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 - to fall out of step, not for secrecy


class DynamoStore(_Conditional):
    """One item an environment, with its version; a put that wants the version that was read."""

    def __init__(self, where: str, table: str, environment: str, client: Any) -> None:
        super().__init__(where)
        self._table, self._environment, self._client = table, environment, client

    def _get(self) -> tuple[dict[str, Any] | None, Any, float]:
        answer = self._client.get_item(
            TableName=self._table, Key={"environment": {"S": self._environment}}, ConsistentRead=True
        )
        item = answer.get("Item")
        if item is None:
            return None, 0, _clock(answer)
        return json.loads(item["book"]["S"]), int(item["version"]["N"]), _clock(answer)

    def _put(self, document: dict[str, Any], version: Any) -> bool:
        item = {
            "environment": {"S": self._environment},
            "version": {"N": str(version + 1)},
            "book": {"S": json.dumps(document)},
        }
        condition: dict[str, Any] = {"ConditionExpression": "attribute_not_exists(environment)"}
        if version:
            condition = {
                "ConditionExpression": "version = :read",
                "ExpressionAttributeValues": {":read": {"N": str(version)}},
            }
        try:
            self._client.put_item(TableName=self._table, Item=item, **condition)
        except self._client.exceptions.ConditionalCheckFailedException:
            return False
        return True


class S3Store(_Conditional):
    """One object an environment; a put with If-Match on the entity tag that was read."""

    def __init__(self, where: str, bucket: str, key: str, client: Any) -> None:
        super().__init__(where)
        self._bucket, self._key, self._client = bucket, key, client

    def _get(self) -> tuple[dict[str, Any] | None, Any, float]:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchKey":
                raise
            return None, None, _clock(error.response)
        return json.loads(answer["Body"].read()), answer["ETag"], _clock(answer)

    def _put(self, document: dict[str, Any], version: Any) -> bool:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._key,
                Body=json.dumps(document).encode(),
                ContentType="application/json",
                **condition,
            )
        except ClientError as error:
            # 409: another conditional put of the same object was under way.
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                return False
            raise
        return True


def _client(service: str, options: Mapping[str, Any] | None) -> Any:
    import boto3
    from botocore.config import Config

    # Short enough that a lease's holder notices in time.
    config = Config(connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})
    return boto3.client(service, config=config, **(options or {}))


def _clock(answer: Mapping[str, Any]) -> float:
    """The server's time, from its answer."""
    return email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


class _Answers:
    """Makes one Problem of all the ways in which AWS does not do what it is asked."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, (BotoCoreError, ClientError)):
            raise Problem(
                f"The locks in {self._where} cannot be reached ({error})",
                code="lock-store-unreachable",
                next_command="aws sts get-caller-identity",
            ) from error
