// ["sign", secret, body] or ["verify", secret, body, signature] in, what the library answers out: both as JSON.
import { readFileSync } from "node:fs";
import * as library from "@octokit/webhooks-methods";

const [what, ...given] = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(await library[what](...given)));
