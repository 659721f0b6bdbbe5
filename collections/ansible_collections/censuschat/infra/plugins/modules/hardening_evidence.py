#!/usr/bin/python
# Copyright: CensusChat platform team
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""Documentation; the work is done by the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: hardening_evidence
short_description: Keep an environment's hardening report as a page, as JSON and as metrics
version_added: 0.1.0
description:
  - Takes what M(censuschat.infra.node_harden) reported of each node of the play and brings the environment's report to
    it - C(index.html), C(report.json) and C(hardening.prom) in one directory on the controller, with a bounded history.
  - Runs on the controller only, once a play, and needs no connection. Give the task C(run_once).
  - A node that was unreachable, or failed before its report, is in the report as such, with the cause. Its results of
    an earlier run are shown as that, and count nowhere.
  - The trend of a node is against its last report with other results, not against the last run. A control that failed
    on Monday is still told as newly failed on Tuesday, with Monday's date, until its results differ again. A control
    that failed and is now excluded is told as no longer held, never as newly passing.
  - What V(changed) was in an apply is told as passing, with the time of its repair. It was observed again and holds.
  - A run that finds the same results changes the times of the last look and the number of looks, and nothing else. That
    is not reported as a change.
  - Details are kept without what looks like a secret, at most 2000 characters each.
author:
  - CensusChat platform team (@censuschat)
extends_documentation_fragment:
  - censuschat.infra.attributes
  - censuschat.infra.attributes.action
options:
  state:
    description:
      - V(present) brings the report to the results of this run.
      - V(begun) notes that a run begins. Should it end without V(present), because no node could be reached or because
        it was killed, then the page says so at once, and the next run tells its nodes as nodes without a report. Of a
        run that was begun on another machine that is told after a day. On a controller without C(/proc) nothing is
        noted.
      - Register V(begun) under the name that O(report) has. It then takes the place of a report that an earlier play of
        the same C(ansible-playbook) left.
      - V(shown) reads the report and changes nothing.
    type: str
    choices: [present, begun, shown]
    default: present
  environment_name:
    description: The environment that the report is of.
    type: str
    required: true
  directory:
    description:
      - Directory on the controller. One environment each.
      - Without it C(censuschat-infra/ENVIRONMENT/hardening) in the user's state directory (E(XDG_STATE_HOME), else
        C(~/.local/state)).
    type: path
  report:
    description: The variable in which each node's result of M(censuschat.infra.node_harden) is registered.
    type: str
    default: hardening_report
  expected:
    description:
      - All nodes of the environment. Those that are not in this play (C(--limit)) keep their results, told as those of
        an earlier run; those that never reported are told as such; others are taken out of the report.
      - Without it, the nodes of the play and those that the report already has.
    type: list
    elements: str
  metrics:
    description:
      - A second place of the metrics, a file whose name ends in C(.prom), for example in the directory that the
        controller's own node_exporter is given as C(--collector.textfile.directory).
    type: path
  keep:
    description: Number of states in the history, and of files in C(history/).
    type: int
    default: 50
  secrets:
    description:
      - Texts that must not be written, wherever they turn up. Values that the inventory keeps as single vaulted strings
        are known without this.
    type: list
    elements: str
    default: []
attributes:
  platform:
    support: full
    platforms: posix
notes:
  - For AWX, O(directory) has to be on a volume that outlives the job's container.
  - Nodes that were unreachable never come to a later task. Put the roles and this task into C(block) and C(always) of
    one play, as the playbook C(censuschat.infra.harden) does.
"""

EXAMPLES = r"""
- name: Harden and keep the evidence
  hosts: nodes
  gather_facts: false
  tasks:
    - name: Begin the evidence
      censuschat.infra.hardening_evidence:
        state: begun
        environment_name: production
      run_once: true
      register: hardening_report

    - name: Harden
      block:
        - name: Hold the node to its profile
          ansible.builtin.import_role:
            name: censuschat.infra.hardening
      always:
        - name: Keep the evidence
          censuschat.infra.hardening_evidence:
            environment_name: production
            expected: "{{ groups['nodes'] }}"
            metrics: /var/lib/prometheus/node-exporter/hardening.prom
          run_once: true
"""

RETURN = r"""
begun:
  description: Whether this only noted that a run begins.
  returned: success
  type: bool
directory:
  description: Where the evidence is.
  returned: success
  type: str
page:
  description: The page's path.
  returned: success
  type: str
verdict:
  description: C(level), one of V(good), V(warn) and V(bad), and C(text), one sentence.
  returned: success
  type: dict
  sample: {"level": "bad", "text": "1 control does not hold, on 1 of 4 nodes."}
totals:
  description: Nodes by state, results by kind and failed results by severity.
  returned: success
  type: dict
summary:
  description: The report in lines for a terminal.
  returned: success
  type: list
  elements: str
would_write:
  description: In check mode, the paths that would be written or removed.
  returned: in check mode
  type: list
  elements: str
"""
