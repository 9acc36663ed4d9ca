/** Safe connections: when they are TLS, and what is said where they do not come about. The folder is of `branchline certs`. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { createClient } from "@connectrpc/connect";

import { ServerService } from "../src/gen/branchline/v1/server_pb.js";
import { connectTo, type Safety, TlsError } from "../src/node.js";

const ADDRESS = process.env["BRANCHLINE_ADDRESS"] || "unset";
const CA = process.env["BRANCHLINE_CA"] ?? "";
const OTHER_CA = process.env["TEST_OTHER_CA"] ?? "";
const EXPECTED = process.env["TEST_FAULT"] ?? "";
const SKIP = EXPECTED ? false : "TEST_FAULT is not set";

async function faultOf(safety: Safety): Promise<string> {
  const server = createClient(ServerService, connectTo(ADDRESS, undefined, safety));
  try {
    await server.getServerInfo({}, { timeoutMs: 20_000 });
    return "none";
  } catch (error) {
    return error instanceof TlsError ? error.fault : String(error);
  }
}

test("what keeps client and server from talking in safety is typed", { skip: SKIP }, async () => {
  const ca = readFileSync(CA);

  assert.equal(await faultOf({ ca }), EXPECTED);
  if (EXPECTED === "none") {
    assert.equal(await faultOf({ ca: readFileSync(OTHER_CA) }), "unknown_authority");
    assert.equal(await faultOf({}), "tls_required");
  }
});

test("plaintext and an authority do not go together", () => {
  assert.throws(() => connectTo("gateway.example", undefined, { ca: "PEM", insecure: true }), TypeError);
});
