/** How Node reaches Branchline: gRPC over HTTP/2, with TLS to anything but this host. */

import { Code, ConnectError, type Interceptor, type Transport } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { refusalOf } from "./errors.js";
import { faultOf, isLocal, TlsError } from "./tls.js";

export { TlsError, type TlsFault } from "./tls.js";

export interface Safety {
  /** Authorities to believe in the place of Node's, as PEM; asks for TLS everywhere. */
  ca?: string | Buffer;
  /** Plaintext, also to another host. */
  insecure?: boolean;
}

/**
 * Makes a transport for `createClient`. A call that fails for want of a safe connection throws `TlsError`.
 *
 * @param address such as "127.0.0.1:7700" or "branchline.example.com:443"; a scheme, http or https, says for itself
 * @param token an API token; none is needed for the few methods that are open to all
 */
export function connectTo(address: string, token?: string, safety: Safety = {}): Transport {
  const url = urlOf(address, safety);
  if (url.protocol === "http:" && !isLocal(url)) {
    process.emitWarning(`the connection to ${url.host} is not encrypted: whoever is between reads the token`);
  }
  const bearer: Interceptor = (next) => (request) => {
    if (token !== undefined) {
      request.header.set("authorization", `Bearer ${token}`);
    }
    return next(request);
  };
  const explained: Interceptor = (next) => async (request) => {
    try {
      return await next(request);
    } catch (error) {
      throw request.signal.aborted ? error : await explain(error, url, safety.ca);
    }
  };
  return createGrpcTransport({
    baseUrl: url.origin,
    interceptors: [explained, bearer],
    ...(safety.ca === undefined ? {} : { nodeOptions: { ca: safety.ca } }),
  });
}

/** How a connection that is not made looks; Canceled is a server's that drops what it does not understand. */
const BROKEN = [Code.Unavailable, Code.Internal, Code.Unknown, Code.Aborted, Code.Canceled];

function urlOf(address: string, { ca, insecure }: Safety): URL {
  if (ca !== undefined && insecure === true) {
    throw new TypeError("a connection without TLS has no use for a CA: leave out one of the two");
  }
  if (address.includes("://")) {
    return new URL(address);
  }
  const plain = insecure ?? (ca === undefined && isLocal(new URL(`http://${address}`)));
  return new URL(`${plain ? "http" : "https"}://${address}`);
}

/** Returns the error, or what is behind it where that is TLS. */
async function explain(error: unknown, url: URL, ca?: string | Buffer): Promise<unknown> {
  const failed = ConnectError.from(error);
  if (!BROKEN.includes(failed.code) || refusalOf(failed)) {
    return error;
  }
  const fault = await faultOf(url, ca);
  return fault === undefined ? error : new TlsError(url, fault, error);
}
