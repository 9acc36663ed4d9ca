/** The client against a server that runs: set BRANCHLINE_ADDRESS and BRANCHLINE_TOKEN. */

import assert from "node:assert/strict";
import { after, test } from "node:test";

import { type CallOptions, Code, ConnectError, createClient } from "@connectrpc/connect";

import { refusalOf } from "../src/errors.js";
import { ErrorReason } from "../src/gen/branchline/v1/errors_pb.js";
import { EntityKind } from "../src/gen/branchline/v1/common_pb.js";
import { OrganizationService, type WatchOrganizationResponse } from "../src/gen/branchline/v1/organizations_pb.js";
import { ServerService } from "../src/gen/branchline/v1/server_pb.js";
import { TaskService } from "../src/gen/branchline/v1/tasks_pb.js";
import { UserService } from "../src/gen/branchline/v1/users_pb.js";
import { FrameKind } from "../src/gen/branchline/v1/watches_pb.js";
import { connectTo } from "../src/node.js";

const ADDRESS = process.env["BRANCHLINE_ADDRESS"] || "unset";
const TOKEN = process.env["BRANCHLINE_TOKEN"] ?? "";
const SKIP = ADDRESS !== "unset" && TOKEN ? false : "BRANCHLINE_ADDRESS and BRANCHLINE_TOKEN are not set";

const stop = new AbortController();
const options: CallOptions = { timeoutMs: 30_000, signal: stop.signal };
const transport = connectTo(ADDRESS, TOKEN);
const organizations = createClient(OrganizationService, transport);
const tasks = createClient(TaskService, transport);

after(() => stop.abort());

async function anOrganization(): Promise<string> {
  const { organizations: mine } = await organizations.listOrganizations({}, options);
  assert.ok(mine[0], "the token's user is a member of no organization");
  return mine[0].id;
}

/** Reads a watch to the frame that completes the view. */
async function untilSynced(frames: AsyncIterable<WatchOrganizationResponse>): Promise<WatchOrganizationResponse[]> {
  const seen: WatchOrganizationResponse[] = [];
  for await (const frame of frames) {
    seen.push(frame);
    if (frame.header?.kind === FrameKind.SYNCED) {
      return seen;
    }
  }
  throw new Error("the watch ended before it was complete");
}

test("everybody may ask what the server is", { skip: SKIP }, async () => {
  const info = await createClient(ServerService, connectTo(ADDRESS)).getServerInfo({}, options);

  assert.match(info.version, /^\d+\.\d+/);
  assert.ok(Number(info.limits?.requestBytes) > 0);
});

test("a token speaks for its user", { skip: SKIP }, async () => {
  const { user } = await createClient(UserService, transport).getCurrentUser({}, options);

  assert.match(user?.id ?? "", /^usr_/);
});

test("a call without a token fails with a reason that is typed", { skip: SKIP }, async () => {
  const stranger = createClient(UserService, connectTo(ADDRESS));

  const error = await stranger.getCurrentUser({}, options).then(() => undefined, ConnectError.from);

  assert.equal(error?.code, Code.Unauthenticated);
  assert.equal(refusalOf(error)?.reason, ErrorReason.TOKEN_MISSING);
});

test("a watch shows the tasks that a list shows, and goes on where the list ended", { skip: SKIP }, async () => {
  const organizationId = await anOrganization();
  const selection = { organizationId, kinds: [EntityKind.TASK] };

  const listed = await tasks.listTasks({ organizationId, pageSize: 1000 }, options);
  const frames = await untilSynced(organizations.watchOrganization(selection, options));
  const resumed = await untilSynced(
    organizations.watchOrganization({ ...selection, resumeToken: listed.resumeToken }, options),
  );

  const shown = frames.flatMap((frame) => frame.changes).flatMap(({ entity }) =>
    entity.case === "task" ? [entity.value.id] : [],
  );
  assert.equal(frames[0]?.header?.kind, FrameKind.RESET);
  assert.deepEqual(shown.toSorted(), listed.tasks.map((task) => task.id).toSorted());
  assert.ok(resumed.every((frame) => frame.header?.kind !== FrameKind.RESET));
});
