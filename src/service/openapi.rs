//! What the service says of itself: `GET /openapi.json`, of the types and routes that are compiled.

use serde_json::{Value, json};

use super::problem::ProblemBody;
use super::routes;

/// The statuses that any route may answer with besides its own, and what they mean.
const PROBLEMS: [(&str, &str); 15] = [
    ("400", "The request makes no sense"),
    ("401", "No bearer token, or none that is known"),
    ("403", "The token's scope does not reach that far"),
    ("404", "What is named does not exist"),
    ("405", "The route has no such method"),
    ("408", "The body came too slowly"),
    ("409", "Understood and not done: unsafe, or in conflict with something"),
    ("413", "The body is too large"),
    ("415", "The body is no JSON by its content type"),
    ("422", "The image is corrupt or not supported, or the idempotency key is another request's"),
    ("423", "Somebody else uses it now"),
    ("429", "There are too many jobs"),
    ("502", "A store failed"),
    ("503", "The service is ending, or too busy"),
    ("507", "Too little space"),
];

/// The description, as `OpenAPI` 3.1.
#[must_use]
pub fn document() -> Value {
    let mut value = serde_json::to_value(routes::described()).unwrap_or_default();
    value["info"] = json!({
        "title": "qchain",
        "description": "The storage-side owner of qcow2 snapshot chains: chains, plans, durable jobs.",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        "version": env!("CARGO_PKG_VERSION"),
    });
    value["security"] = json!([{"bearer": []}]);
    value["components"]["securitySchemes"] = json!({"bearer": {"type": "http", "scheme": "bearer"}});
    value["components"]["schemas"]["Problem"] = problem();
    tell_kinds(&mut value["components"]["schemas"]);
    tell_ranges(&mut value);
    if let Some(paths) = value["paths"].as_object_mut() {
        for operation in
            paths.values_mut().filter_map(Value::as_object_mut).flat_map(|path| path.values_mut())
        {
            add_problems(operation);
        }
    }
    value
}

fn problem() -> Value {
    use utoipa::PartialSchema as _;
    serde_json::to_value(ProblemBody::schema()).unwrap_or_default()
}

/// Puts the word that tells kinds of jobs apart among each kind's own properties: as derived it stands beside them, while
/// they allow no other, so that nothing would be a job.
fn tell_kinds(schemas: &mut Value) {
    let Some(variants) = schemas["JobRequest"]["oneOf"].as_array_mut().map(std::mem::take) else { return };
    let mut kinds = Vec::new();
    let mut mapping = serde_json::Map::new();
    for variant in variants {
        let (reference, tag) = (&variant["allOf"][0]["$ref"], &variant["allOf"][1]["properties"]["kind"]);
        if let Some(name) = reference.as_str().and_then(|path| path.rsplit('/').next()) {
            let own = &mut schemas[name];
            own["properties"]["kind"] = tag.clone();
            match own["required"].as_array_mut() {
                Some(required) => required.push(json!("kind")),
                None => own["required"] = json!(["kind"]),
            }
        }
        if let Some(word) = tag["enum"][0].as_str() {
            mapping.insert(word.to_owned(), reference.clone());
        }
        kinds.push(json!({"$ref": reference}));
    }
    schemas["JobRequest"]["oneOf"] = Value::Array(kinds);
    schemas["JobRequest"]["discriminator"] = json!({"propertyName": "kind", "mapping": mapping});
}

/// Says of what is never below 0 that it is unsigned: as derived its format would end at half of what is taken. Of events
/// says nothing but that they are: what each has is the stream's own form.
fn tell_ranges(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(tell_ranges),
        Value::Object(map) => {
            if map.get("minimum").is_some_and(|least| *least == json!(0))
                && let Some(Value::String(format)) = map.get_mut("format")
                && format.starts_with("int")
            {
                format.insert(0, 'u');
            }
            if let Some(Value::Object(events)) = map.get_mut("text/event-stream") {
                events.remove("schema");
            }
            map.values_mut().for_each(tell_ranges);
        }
        _ => {}
    }
}

/// Adds what any route may fail with to one operation.
fn add_problems(operation: &mut Value) {
    let open = operation.get("security").is_some_and(|security| *security == json!([{}]));
    let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) else { return };
    for (status, meaning) in PROBLEMS {
        if !open && !responses.contains_key(status) {
            let schema = json!({"$ref": "#/components/schemas/Problem"});
            let content = json!({"application/problem+json": {"schema": schema}});
            responses.insert(status.to_owned(), json!({"description": meaning, "content": content}));
        }
    }
}
