/** Why a call failed, as a value of the contract. */

import { ConnectError } from "@connectrpc/connect";

import { ErrorReason } from "./gen/branchline/v1/errors_pb.js";
import { ErrorInfoSchema } from "./gen/google/rpc/error_details_pb.js";

const DOMAIN = "branchline.dev";

export interface Refusal {
  /** Why. UNSPECIFIED where it is newer than this package. */
  reason: ErrorReason;
  /** The facts that the reason's comment names, such as `task_id`. */
  metadata: Record<string, string>;
}

/** Returns what Branchline said about a failed call; undefined where it said nothing, as when it is not reached. */
export function refusalOf(error: unknown): Refusal | undefined {
  const infos = ConnectError.from(error).findDetails(ErrorInfoSchema);
  const info = infos.find((one) => one.domain === DOMAIN);
  if (info === undefined) {
    return undefined;
  }
  const reason = ErrorReason[info.reason as keyof typeof ErrorReason] ?? ErrorReason.UNSPECIFIED;
  return { reason, metadata: info.metadata };
}
