"""The rules that a new hub and a new site begin with; owners read them and change them."""

HUB_POLICY: str = """\
// The rules of the hub, in Cedar (https://docs.cedarpolicy.com).
//
// Nothing is permitted unless a `permit` says so, and a `forbid` beats every permit. The hub's rules are about what the
// hub does itself. What happens with a site's data is for that site's own rules, which have the last word there.

// Who may hand in jobs.
@id("hub.submit")
permit (principal, action == Action::"submit", resource)
when { principal.roles.containsAny(["scientist", "operator"]) };

// Who may let a model out of a run, give it a name that others rely on, or make it answer requests.
@id("hub.models")
permit (
    principal,
    action in [Action::"release", Action::"promote", Action::"deploy"],
    resource is Model
)
when { principal.roles.containsAny(["scientist", "operator"]) };

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
//   principal.roles                                        of the user who asks
//   resource.name .site .owner .region .purposes .rows .min_group          when `resource is Dataset`
//   context.purpose                                        what the job says it uses the data for
//   context.kind                                           what crosses: update, metric, query, model, prediction,
//                                                          code, log or data; for plan and open, the kind of job
//   context.direction .to                                  "out" of this site or "in" to it, and who receives it
//   context.code                                           digest of the code that would run here
//   context.wire                                           what is done to an update first: ["clip", "int8"]
//   context.bytes .rows                                    its size; the rows that its smallest group stands for

// A dataset may be planned with and opened only for a purpose that it is granted for
// (`atoll data add ... --purpose cardiology-research`).
@id("site.purpose")
permit (
    principal,
    action in [Action::"plan", Action::"open"],
    resource is Dataset
)
when { resource.purposes.contains(context.purpose) };

// What may leave: what was learned from the rows, never the rows. Predictions and log lines stay here, because both
// can repeat what a row says.
// To accept only updates whose size is bounded, add:   && (context.kind != "update" || context.wire.contains("clip"))
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
// To run only code that was reviewed, add:   && (context.kind != "code" || ["sha256:..."].contains(context.code))
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
