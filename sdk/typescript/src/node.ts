/** How Node reaches Branchline: gRPC over HTTP/2, with TLS where the address says https. */

import type { Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

/**
 * Makes a transport for `createClient`.
 *
 * @param address such as "127.0.0.1:7700" or "https://branchline.example.com"; without a scheme there is no TLS
 * @param token an API token; none is needed for the few methods that are open to all
 */
export function connectTo(address: string, token?: string): Transport {
  const bearer: Interceptor = (next) => (request) => {
    if (token !== undefined) {
      request.header.set("authorization", `Bearer ${token}`);
    }
    return next(request);
  };
  const baseUrl = address.includes("://") ? address : `http://${address}`;
  return createGrpcTransport({ baseUrl, interceptors: [bearer] });
}
