// Starts the GitHub simulator on the port given, with one organization. It knows no pull requests, so they are added:
// PUT /pulls sets the open ones of acme/shop.
import { simulation } from "@simulacrum/github-api-simulator";

const port = Number(process.argv[2]);
let pulls = [];
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
  extend: {
    openapiHandlers: () => ({
      "pulls/list": (context, _request, response) =>
        response.status(200).json(context.request.params.repo === "shop" ? pulls : []),
    }),
    extendRouter: (router) => {
      router.put("/pulls", (request, response) => {
        pulls = request.body;
        response.status(204).end();
      });
    },
  },
});
app.listen(port, () => console.log("listening"));
