// SPDX-License-Identifier: Apache-2.0
// Reads an AsyncAPI document with the official parser. Prints what it finds; fails on errors and warnings.
import { readFileSync } from "node:fs";
import { DiagnosticSeverity, Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], "utf8"));
for (const { severity, code, path, message } of diagnostics) {
  console.log(`${DiagnosticSeverity[severity]} ${code} at ${path.join(".")}: ${message}`);
}
const failed = !document || diagnostics.some(({ severity }) => severity <= DiagnosticSeverity.Warning);
process.exitCode = failed ? 1 : 0;
