"""The rules that a new hub and a new site begin with, which owners read and change, and those that datasets bring."""

HUB_POLICY: str = """\
// The rules of the hub, in Cedar (https://docs.cedarpolicy.com).
//
// Nothing is permitted unless a `permit` says so, and a `forbid` beats every permit. The hub's rules are about what the
// hub does itself. What happens with a site's data is for that site's own rules, which have the last word there.
//
// What a rule can look at, of the user who asks: principal.name .roles .projects; resource.project of a job; and
// context.by, who asked for what is to be approved, or whose run it is that is to be cancelled.
// A permit to submit, promote, deploy or erase may be given to two people only. Write @approval("operator") before it:
// what no other rule permits is then kept, until another user with that role approves it.

// Who may see runs, sites, models and deployments.
@id("hub.view")
permit (principal, action == Action::"view", resource)
when { principal.roles.containsAny(["viewer", "scientist", "operator", "owner", "auditor"]) };

// Who may see the record: what crossed borders, who did what under which rule, whether the journals hold.
@id("hub.audit")
permit (principal, action == Action::"audit", resource)
when { principal.roles.containsAny(["auditor", "operator", "owner"]) };

// Who may hand in jobs: those who work in the job's project.
@id("hub.submit")
permit (principal, action == Action::"submit", resource)
when
{
    principal.roles.containsAny(["scientist", "operator"]) &&
    principal.projects.contains(resource.project)
};

// The hub's owners, in any project.
@id("hub.submit-any")
permit (principal, action == Action::"submit", resource)
when { principal.roles.contains("owner") };

// Who may end a run: whose it is, and operators.
@id("hub.cancel-own")
permit (principal, action == Action::"cancel", resource)
when { context.by == principal.name };

@id("hub.cancel")
permit (principal, action == Action::"cancel", resource)
when { principal.roles.containsAny(["operator", "owner"]) };

// Who may let out of a run what it found (losses, merged metrics and answers to queries, never one site's rows), and so
// who reads what the runs of others found: those who work in the job's project.
@id("hub.results")
permit (principal, action == Action::"release", resource is Job)
when
{
    principal.roles.contains("scientist") &&
    principal.projects.contains(resource.project)
};

// Who may have the model that a run made registered, which is asked of the run's own user.
@id("hub.results-model")
permit (principal, action == Action::"release", resource is Model)
when { principal.roles.contains("scientist") };

// Operators and owners, in any project.
@id("hub.results-any")
permit (principal, action == Action::"release", resource)
when { principal.roles.containsAny(["operator", "owner"]) };

// Who may give a model a name that others rely on, or make it answer requests.
@id("hub.models")
permit (
    principal,
    action in [Action::"promote", Action::"deploy"],
    resource
)
when { principal.roles.containsAny(["operator", "owner"]) };

// Who may take a model along, out of Atoll: weights, code and lineage. From then on no rule of anybody's holds for it.
@id("hub.export")
permit (principal, action == Action::"export", resource)
when { principal.roles.containsAny(["operator", "owner"]) };

// Who may remove a model's weights for good.
@id("hub.erase")
permit (principal, action == Action::"erase", resource)
when { principal.roles.contains("owner") };

// Who may agree to what another asked for, where a rule wants two people.
@id("hub.approve")
permit (principal, action == Action::"approve", resource)
when { principal.roles.containsAny(["operator", "owner"]) };

@id("hub.two-people")
@reason("nobody approves what they asked for themselves")
forbid (principal, action == Action::"approve", resource)
when { context.by == principal.name };

// Who may invite sites and shut them out, and go on with interrupted runs.
@id("hub.administer")
permit (principal, action == Action::"administer", resource)
when { principal.roles.contains("operator") && ["runs", "sites"].contains(resource.part) };

// Who says who the users are.
@id("hub.users")
permit (principal, action == Action::"administer", resource)
when { principal.roles.contains("owner") };

// The hub does not stand in the way of what a site permits.
@id("hub.sites-decide")
permit (
    principal,
    action in [Action::"plan", Action::"open", Action::"cross"],
    resource
);

// ... with one exception: rows are not for the hub, even where a site would give them.
@id("hub.no-rows")
@reason("the hub takes no rows; send the job to the data instead")
forbid (principal, action == Action::"cross", resource)
when { context.kind == "data" };
"""

SITE_POLICY: str = """\
// The rules of this site, in Cedar (https://docs.cedarpolicy.com). They are yours: change them, and they are in force
// at the next question. A file with a mistake is refused, and the rules before it stay in force.
//
// Nothing is permitted unless a `permit` says so, and a `forbid` beats every permit.
// Each rule has an @id; refusals and the journal name it. A `forbid` may have a @reason for people to read.
//
// What a rule can look at:
//   principal.name .roles .projects                        of the user who asks, as the hub vouches for them
//   resource.name .site .owner .region .purposes .rows .min_group .regions when `resource is Dataset`
//   context.purpose                                        what the job says it uses the data for
//   context.kind                                           what crosses: update, metric, query, model, prediction,
//                                                          code, log or data; for plan and open, the kind of job
//   context.direction .to .region                          "out" of this site or "in" to it; who receives it, and where
//   context.code .approved .signer .sandbox                digest of the code that would run here; whether you approved
//                                                          it, who of those you trust signed it, whether in a sandbox
//   context.wire                                           what is done to an update first: ["clip", "int8"]
//   context.bytes .rows                                    its size; the rows that its smallest group stands for
//   context.privacy .epsilon .delta_one_in                 what a run that trains here promises of each "record" or
//                                                          of the "site"; "", a huge epsilon and 1 if it does not
// Beside them stand a dataset's own terms, which no rule here takes away: a grant that has ended is refused, and so is
// an update without the transforms that the dataset asks for, what would leave for another region than it may go to,
// and a run that costs more than is left of the dataset's privacy budget, or promises nothing where there is one
// (rules terms.ended, terms.wire, terms.region, terms.budget).

// A dataset may be planned with and opened only for a purpose that it is granted for
// (`atoll data add ... --purpose cardiology-research`).
@id("site.purpose")
permit (
    principal,
    action in [Action::"plan", Action::"open"],
    resource is Dataset
)
when { resource.purposes.contains(context.purpose) };

// At most so much epsilon in a run, whatever its dataset's budget:
//   @id("site.epsilon")
//   forbid (principal, action in [Action::"plan", Action::"open"], resource is Dataset)
//   when { context.kind == "train" && context.epsilon.greaterThan(decimal("4.0")) };

// What may leave: what was learned from the rows, never the rows. Predictions and log lines stay here, because both
// can repeat what a row says.
// Only updates of bounded norm, whichever dataset:   && (context.kind != "update" || context.wire.contains("clip"))
@id("site.results")
permit (principal, action == Action::"cross", resource is Dataset)
when
{
    context.direction == "out" &&
    ["update", "metric", "model"].contains(context.kind) &&
    resource.purposes.contains(context.purpose)
};

// Answers to queries may leave when each group in them stands for enough rows.
@id("site.answers")
permit (principal, action == Action::"cross", resource is Dataset)
when
{
    context.direction == "out" &&
    context.kind == "query" &&
    resource.purposes.contains(context.purpose) &&
    context.rows >= resource.min_group
};

// What may come in to work on the data: a model's weights, the task's code, a query's text.
// To run only code that you have read and let run by `atoll site approve DIGEST`, which shows what is new in it, add:
//    && (context.kind != "code" || context.approved)
// To run also what those sign whose keys you trust (`atoll site trust KEY --name ada`):
//    && (context.kind != "code" || context.approved || ["ada"].contains(context.signer))
// To run none outside of a sandbox:   && (context.kind != "code" || context.sandbox)
@id("site.work")
permit (principal, action == Action::"cross", resource is Dataset)
when
{
    context.direction == "in" &&
    ["model", "code", "query"].contains(context.kind) &&
    resource.purposes.contains(context.purpose)
};

// Said once more and for good: whatever is permitted above or added later, rows do not leave.
@id("rows.stay")
@reason("rows never leave the site where they lie")
forbid (principal, action == Action::"cross", resource)
when { context.kind == "data" && context.direction == "out" };
"""

# A dataset's terms bind whoever works at its site. They are decided with the site's own rules and not written in its
# file, so that a file without them, or an older one, keeps to them all the same.
TERMS: str = """\
@id("terms.ended")
forbid (
    principal,
    action in [Action::"plan", Action::"open", Action::"cross"],
    resource is Dataset
)
when { resource.ended.contains(context.purpose) };

@id("terms.wire")
forbid (principal, action == Action::"cross", resource is Dataset)
when { !context.lacks.isEmpty() };

@id("terms.region")
forbid (principal, action == Action::"cross", resource is Dataset)
when
{
    context.direction == "out" &&
    !(resource.regions.isEmpty() || resource.regions.contains(context.region))
};

@id("terms.budget")
forbid (principal, action in [Action::"plan", Action::"open", Action::"cross"], resource is Dataset)
when { !context.overdraws.isEmpty() };
"""
