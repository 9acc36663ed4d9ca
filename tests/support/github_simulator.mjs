// Starts the GitHub simulator on the port given, with one organization.
import { simulation } from "@simulacrum/github-api-simulator";

const port = Number(process.argv[2]);
const app = simulation({
  initialState: {
    users: [{ login: "alice", organizations: ["acme"] }],
    organizations: [{ login: "acme" }],
    repositories: [
      { owner: "acme", name: "shop" },
      { owner: "acme", name: "site", default_branch: "trunk" },
    ],
    branches: [{ name: "main" }, { name: "topic", protected: false }],
    blobs: [],
  },
});
app.listen(port, () => console.log("listening"));
