/** What the stubs promise: JSON without a registry, 64-bit numbers as strings, typing errors that do not compile. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { create, equals, fromBinary, fromJsonString, toBinary, toJson, toJsonString } from "@bufbuild/protobuf";
import { timestampFromDate } from "@bufbuild/protobuf/wkt";

import {
  type OrganizationChange,
  type WatchOrganizationResponse,
  WatchOrganizationResponseSchema,
} from "../src/gen/branchline/v1/organizations_pb.js";
import { type Task, TaskActivity, TaskSchema, TaskState } from "../src/gen/branchline/v1/tasks_pb.js";
import { ChangeType, FrameKind } from "../src/gen/branchline/v1/watches_pb.js";

const LARGE = "9007199254740993"; // 2^53 + 1: a number of JavaScript cannot hold it

function someTask(): Task {
  return create(TaskSchema, {
    id: "task_1",
    title: "Say hello",
    prompt: {
      text: "say hello",
      attachments: [{ content: { case: "fileExcerpt", value: { path: "README.md", startLine: 1, text: "hello" } } }],
    },
    state: TaskState.ACTIVE,
    activity: TaskActivity.RUNNING,
    creator: { actor: { case: "userId", value: "usr_1" } },
    createTime: timestampFromDate(new Date("2026-01-02T03:04:05Z")),
    revision: LARGE,
  });
}

function someFrame(): WatchOrganizationResponse {
  return create(WatchOrganizationResponseSchema, {
    header: { kind: FrameKind.CHANGES, resumeToken: "token", heartbeatInterval: { seconds: 10n } },
    changes: [
      {
        type: ChangeType.UPSERTED,
        entity: {
          case: "task",
          value: { id: "task_1", state: TaskState.ACTIVE, revision: LARGE, sessions: [{ id: "ses_1" }] },
        },
      },
      { type: ChangeType.DELETED, entity: { case: "repository", value: { id: "repo_1" } } },
    ],
  });
}

test("a task comes back from JSON as it was", () => {
  const task = someTask();

  assert.ok(equals(TaskSchema, fromJsonString(TaskSchema, toJsonString(TaskSchema, task)), task));
});

test("the JSON of a task is for people: words for states, text for times, strings for 64-bit numbers", () => {
  const json = JSON.parse(JSON.stringify(toJson(TaskSchema, someTask()))) as Record<string, unknown>;

  assert.equal(json["revision"], LARGE);
  assert.equal(json["state"], "TASK_STATE_ACTIVE");
  assert.equal(json["createTime"], "2026-01-02T03:04:05Z");
});

test("a frame of a watch comes back from JSON without a registry", () => {
  const frame = someFrame();

  const json = toJsonString(WatchOrganizationResponseSchema, frame);

  assert.ok(equals(WatchOrganizationResponseSchema, fromJsonString(WatchOrganizationResponseSchema, json), frame));
  assert.ok(!json.includes("@type"));
});

test("a frame of a watch comes back from its bytes", () => {
  const frame = someFrame();
  const bytes = toBinary(WatchOrganizationResponseSchema, frame);

  assert.ok(equals(WatchOrganizationResponseSchema, fromBinary(WatchOrganizationResponseSchema, bytes), frame));
});

test("a 64-bit number is a string, and one that is too large for a number keeps its last digit", () => {
  const frame = fromBinary(WatchOrganizationResponseSchema, toBinary(WatchOrganizationResponseSchema, someFrame()));

  assert.deepEqual(frame.changes.map(revisionOf), [LARGE, "0"]);
});

/** Which entity a change is of decides which fields it has: the compiler knows them. */
function revisionOf(change: OrganizationChange): string {
  switch (change.entity.case) {
    case "task":
      return change.entity.value.revision;
    case "repository":
      return change.entity.value.revision;
    default:
      return "";
  }
}

/** Never called: it is here to be compiled. Each line under a mark would be an error without it. */
export function mistakesThatDoNotCompile(change: OrganizationChange): void {
  // @ts-expect-error there is no such state
  create(TaskSchema, { state: TaskState.ACTVE });
  // @ts-expect-error an activity is no state
  create(TaskSchema, { state: TaskActivity.RUNNING });
  // @ts-expect-error a 64-bit number is a string
  create(TaskSchema, { revision: 1 });
  // @ts-expect-error there is no such kind of entity
  if (change.entity.case === "taks") {
    return;
  }
  if (change.entity.case === "task") {
    // @ts-expect-error a summary has no prompt
    change.entity.value.prompt;
  }
}
