/** How a connection is kept safe, and what is wrong where it does not come about. */

import { isIP } from "node:net";
import { connect } from "node:tls";

import { Code, ConnectError } from "@connectrpc/connect";

/** Why client and server cannot talk in safety. */
export type TlsFault =
  | "unknown_authority"
  | "expired"
  | "not_yet_valid"
  | "wrong_name"
  /** The server speaks plaintext, the client TLS. */
  | "no_tls"
  /** The server speaks TLS, the client plaintext. */
  | "tls_required";

const WORDS: Record<TlsFault, string> = {
  unknown_authority: "its certificate is signed by an authority that is not trusted here",
  expired: "its certificate has expired",
  not_yet_valid: "its certificate is not valid yet",
  wrong_name: "its certificate is made for another name",
  no_tls: "it speaks plaintext, and this client TLS",
  tls_required: "it speaks TLS, and this client plaintext",
};

/** https://nodejs.org/api/tls.html#x509-certificate-error-codes */
const CODES: Record<string, TlsFault> = {
  CERT_HAS_EXPIRED: "expired",
  CERT_NOT_YET_VALID: "not_yet_valid",
  DEPTH_ZERO_SELF_SIGNED_CERT: "unknown_authority",
  ERR_SSL_WRONG_VERSION_NUMBER: "no_tls",
  ERR_TLS_CERT_ALTNAME_INVALID: "wrong_name",
  SELF_SIGNED_CERT_IN_CHAIN: "unknown_authority",
  UNABLE_TO_GET_ISSUER_CERT: "unknown_authority",
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "unknown_authority",
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: "unknown_authority",
};

const LOOK_MS = 5_000;

/** The server is there, and its certificate, or plaintext where TLS was wanted, keeps the two from talking. */
export class TlsError extends ConnectError {
  constructor(
    url: URL,
    readonly fault: TlsFault,
    cause: unknown,
  ) {
    super(`${url.host}: ${WORDS[fault]}`, Code.Unavailable, undefined, undefined, cause);
  }

  /** Every ConnectError would count: its class looks at names. */
  static override [Symbol.hasInstance](value: unknown): boolean {
    return value instanceof Error && Object.getPrototypeOf(value) === TlsError.prototype;
  }
}

/** Says what keeps a connection from being made, if it is certificates or their want. */
export async function faultOf(url: URL, ca?: string | Buffer): Promise<TlsFault | undefined> {
  const secure = url.protocol === "https:";
  return new Promise((resolve) => {
    const host = hostOf(url);
    const socket = connect({
      host,
      port: Number(url.port || (secure ? 443 : 80)),
      ALPNProtocols: ["h2"],
      rejectUnauthorized: secure,
      timeout: LOOK_MS,
      ...(isIP(host) ? {} : { servername: host }),
      ...(ca === undefined ? {} : { ca }),
    });
    const end = (fault?: TlsFault) => {
      socket.destroy();
      resolve(fault);
    };
    socket.once("secureConnect", () => end(secure ? undefined : "tls_required"));
    socket.once("timeout", () => end());
    socket.once("error", (error: NodeJS.ErrnoException) => end(secure ? CODES[error.code ?? ""] : undefined));
  });
}

/** Says whether an address is on this host, where nobody is between. */
export function isLocal(url: URL): boolean {
  const host = hostOf(url);
  return host === "localhost" || host === "::1" || (isIP(host) === 4 && host.startsWith("127."));
}

function hostOf(url: URL): string {
  return url.hostname.replace(/^\[|\]$/g, "");
}
