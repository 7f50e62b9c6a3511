"""The messages of gradio's queue that pages have not read yet."""

import itertools
from asyncio import Queue as MessageQueue
from collections import OrderedDict
from typing import Any

MAX_SESSIONS = 2000  # each call through the API is a session


class UnreadMessages(OrderedDict[str, MessageQueue]):
    """The unread messages of each session, the oldest session first.

    gradio's own class deletes the oldest session if there are too many, even while one of its requests runs. The next message to it then raises
    KeyError, which ends the task that sends the progress of all requests. This class keeps the sessions with requests that wait or run.
    gradio also never deletes the ids of requests whose results nobody has read. This class deletes them together with the messages.
    """

    def __init__(self, queue: Any):
        """Args:
            queue: the gradio.queueing.Queue of the page.
        """
        self._queue = queue
        super().__init__(queue.pending_messages_per_session)

    def __setitem__(self, session: str, messages: MessageQueue) -> None:
        super().__setitem__(session, messages)
        if len(self) > MAX_SESSIONS:
            active = {session, *(event.session_hash for event in self._queue.event_ids_to_events.values())}
            for oldest in list(itertools.islice((name for name in self if name not in active), len(self) - MAX_SESSIONS)):
                del self[oldest]
                self._queue.pending_event_ids_session.pop(oldest, None)
