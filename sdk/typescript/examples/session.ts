import { createClient } from "@connectrpc/connect";

import { connectTo } from "@branchline/sdk/node";
import { OrganizationService } from "@branchline/sdk/v1/organizations";
import { RepositoryService } from "@branchline/sdk/v1/repositories";
import { TaskService, TaskState } from "@branchline/sdk/v1/tasks";

const transport = connectTo(process.env["BRANCHLINE_ADDRESS"] ?? "127.0.0.1:7700", process.env["BRANCHLINE_TOKEN"]);
const organizations = createClient(OrganizationService, transport);
const repositories = createClient(RepositoryService, transport);
const tasks = createClient(TaskService, transport);

const organization = (await organizations.listOrganizations({})).organizations[0]!;
const repository = (await repositories.listRepositories({ organizationId: organization.id })).repositories[0]!;

const created = await tasks.createTask({
  requestId: crypto.randomUUID(), // sent again, it makes no second task
  repositoryId: repository.id,
  prompt: { text: "Say hello in README.md" },
});

const watch = tasks.watchTask({
  taskId: created.task!.id,
  consistency: { atLeastAsFresh: [created.consistencyToken] },
});
for await (const { changes } of watch) {
  for (const { entity } of changes) {
    switch (entity.case) {
      case "task":
        console.log(TaskState[entity.value.state], entity.value.branch);
        break;
      case "transcriptEntry":
        // Each change is the whole entry as it is by then; what has an end is complete.
        if (entity.value.endTime && entity.value.content.case === "agentMessage") {
          console.log(entity.value.content.value.text);
        }
        break;
    }
  }
}
