# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Renders templates on the controller and hands definitions over in a file, so that no log has them."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template


class ActionModule(ActionBase):
    """One run of the module."""

    TRANSFERS_FILES = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        arguments = dict(self._task.args)
        definition = arguments.pop("definition", None)
        templates = arguments.pop("template", None) or []
        arguments.pop("payload", None)
        if isinstance(templates, str):
            templates = [templates]
        try:
            rendered = [{"name": t, "text": self._render(t, task_vars)} for t in templates]
        except AnsibleError as error:
            return {**result, "failed": True, "msg": str(error)}
        local = ""
        try:
            if definition is not None or rendered:
                entries = definition if isinstance(definition, list) or definition is None else [definition]
                text = json.dumps({"definition": entries, "templates": rendered}, default=str)
                descriptor, local = tempfile.mkstemp(dir=C.DEFAULT_LOCAL_TMP)
                with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                    handle.write(text)
                arguments["payload"] = self._place(local)
            done: dict[str, Any] = self._execute_module("censuschat.infra.k8s_apply", arguments, task_vars=task_vars)
        finally:
            if local:
                os.unlink(local)
            self._remove_tmp_path(self._connection._shell.tmpdir)
        result.update(done)
        return result

    def _place(self, local: str) -> str:
        """The file's path where the module runs; it is not copied when that is here and as the same user."""
        if self._connection.transport == "local" and not self._play_context.become:
            return local
        if self._connection._shell.tmpdir is None:
            self._make_tmp_path()
        remote = str(self._connection._shell.join_path(self._connection._shell.tmpdir, "payload.json"))
        self._transfer_file(local, remote)
        self._fixup_perms2((self._connection._shell.tmpdir, remote))
        return remote

    def _render(self, name: str, task_vars: dict[str, Any]) -> str:
        source = self._find_needle("templates", name)
        template = trust_as_template(self._loader.get_text_file_contents(source))
        paths = [*task_vars.get("ansible_search_path", []), self._loader.get_basedir(), os.path.dirname(source)]
        search = [place for path in paths for place in (os.path.join(path, "templates"), path)]
        templar = self._templar.copy_with_new_env(searchpath=search, available_variables=task_vars)
        # A template that is one expression would come back as an object; a manifest is text.
        text = templar.template(template, escape_backslashes=False, overrides={"trim_blocks": True})
        return text if isinstance(text, str) else json.dumps(text, default=str)
