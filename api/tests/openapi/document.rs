//! The document, and the parts of JSON Schema that it uses.

use serde_json::{Map, Value, json};

/// The parsed document.
pub struct Document(Value);

/// The members of an object; none of anything else.
pub fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(one) => vec![one],
        Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// A change to a resource: method, path and the schema of its body.
pub type Change = (String, String, Value);

impl Document {
    pub fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi.yaml");
        let text = std::fs::read_to_string(path).unwrap();
        Self(serde_yaml_ng::from_str(&text).unwrap())
    }

    pub fn paths(&self) -> impl Iterator<Item = (&String, &Map<String, Value>)> {
        object(&self.0["paths"]).map(|(path, item)| (path, item.as_object().unwrap()))
    }

    pub fn changes(&self) -> Vec<Change> {
        let mut changes = Vec::new();
        for (path, operations) in self.paths() {
            for (method, operation) in operations {
                let body = self.resolve(&operation["requestBody"]);
                let schema = &body["content"]["application/json"]["schema"];
                if !schema.is_null() {
                    changes.push((method.clone(), path.clone(), schema.clone()));
                }
            }
        }
        changes
    }

    /// The schema of an answer.
    pub fn answer(&self, path: &str, method: &str, status: &str) -> Value {
        let response = self.resolve(&self.0["paths"][path][method]["responses"][status]);
        let schema = response["content"]["application/json"]["schema"].clone();
        assert!(
            schema.is_object(),
            "{method} {path} has no schema for {status}"
        );
        schema
    }

    /// Follows a reference, if it is one.
    pub fn resolve<'a>(&'a self, node: &'a Value) -> &'a Value {
        let Some(reference) = node["$ref"].as_str() else {
            return node;
        };
        let pointer = reference.strip_prefix('#').expect("a local reference");
        let target = self.0.pointer(pointer).expect(reference);
        self.resolve(target)
    }

    /// Bodies that the schema of an object permits: each permitted value of each property, together
    /// with the required ones.
    pub fn permitted(&self, schema: &Value) -> Vec<Value> {
        let mut bodies = vec![self.least(schema)];
        for (name, property) in object(&self.resolve(schema)["properties"]) {
            for value in self.values(property) {
                let mut body = self.least(schema);
                body[name] = value;
                bodies.push(body);
            }
        }
        bodies
    }

    /// Bodies that the schema forbids, each with the name of the property at fault.
    pub fn forbidden(&self, schema: &Value) -> Vec<(String, Value)> {
        let mut bodies = Vec::new();
        for name in strings(&self.resolve(schema)["required"]) {
            let mut body = self.least(schema);
            body.as_object_mut().unwrap().remove(name);
            bodies.push((name.to_owned(), body));
        }
        for (name, property) in object(&self.resolve(schema)["properties"]) {
            for value in self.wrong_values(property) {
                let mut body = self.least(schema);
                body[name] = value;
                bodies.push((name.clone(), body));
            }
        }
        bodies
    }

    /// The object with its required properties only.
    fn least(&self, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        let mut body = json!({});
        for name in strings(&schema["required"]) {
            body[name] = self.values(&schema["properties"][name])[0].clone();
        }
        body
    }

    /// Values that a schema permits, its limits included.
    fn values(&self, schema: &Value) -> Vec<Value> {
        let schema = self.resolve(schema);
        if let Some(choices) = schema["anyOf"].as_array() {
            return choices
                .iter()
                .flat_map(|choice| self.values(choice))
                .collect();
        }
        if let Some(values) = schema["enum"].as_array() {
            return values.clone();
        }
        let mut values = Vec::new();
        for kind in strings(&schema["type"]) {
            match kind {
                "null" => values.push(Value::Null),
                "boolean" => values.extend([json!(true), json!(false)]),
                "integer" => {
                    let limits = [&schema["minimum"], &schema["maximum"]];
                    values.extend(limits.into_iter().filter(|limit| !limit.is_null()).cloned());
                }
                "string" => match schema["examples"].as_array() {
                    Some(examples) => values.extend(examples.clone()),
                    None => values.push(json!("any text")),
                },
                "object" if schema["maxProperties"] == 0 => values.push(json!({})),
                "object" => values.extend(self.permitted(schema)),
                other => panic!("no values of type {other}"),
            }
        }
        values
    }

    /// Values that a schema forbids.
    fn wrong_values(&self, schema: &Value) -> Vec<Value> {
        let schema = self.resolve(schema);
        let kinds = strings(&schema["type"]);
        let mut candidates = vec![
            json!(null),
            json!(true),
            json!(false),
            json!(1),
            json!(1.5),
            json!(-1),
            json!("\u{0}"),
            json!([]),
            json!(["x"]),
            json!([null, null]),
            json!({ "__unknown": 1 }),
        ];
        for (limit, step) in [("minimum", -1), ("maximum", 1)] {
            if let Some(limit) = schema[limit].as_i64() {
                candidates.push(json!(limit + step));
            }
        }
        if let Some(length) = schema["maxLength"].as_u64() {
            candidates.push(json!("a".repeat(usize::try_from(length).unwrap() + 1)));
        }
        if kinds.contains(&"string") && schema["pattern"].is_null() && schema["enum"].is_null() {
            // Free text: every string is permitted.
            candidates.retain(|value| !value.is_string());
        }
        candidates.retain(|value| self.conforms(schema, value).is_err());
        candidates
    }

    /// Checks `value` against `schema`; a pattern only forbids NUL here.
    pub fn conforms(&self, schema: &Value, value: &Value) -> Result<(), String> {
        let schema = self.resolve(schema);
        if let Some(choices) = schema["anyOf"].as_array() {
            let fits = choices
                .iter()
                .any(|choice| self.conforms(choice, value).is_ok());
            return fits.then_some(()).ok_or(format!("{value} fits no choice"));
        }
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        if !strings(&schema["type"]).contains(&kind) {
            return Err(format!("{value} is of type {kind}"));
        }
        if schema["enum"]
            .as_array()
            .is_some_and(|values| !values.contains(value))
        {
            return Err(format!("{value} is not in the list"));
        }
        match value {
            Value::Number(number) => in_range(schema, number),
            Value::String(text) => {
                let longest = schema["maxLength"].as_u64().unwrap_or(u64::MAX);
                let too_long = text.len() as u64 > longest;
                let has_nul = !schema["pattern"].is_null() && text.contains('\0');
                if too_long || has_nul {
                    return Err(format!("{value} does not match"));
                }
                Ok(())
            }
            Value::Array(items) => items
                .iter()
                .try_for_each(|item| self.conforms(&schema["items"], item)),
            Value::Object(members) => self.members_conform(schema, members),
            Value::Null | Value::Bool(_) => Ok(()),
        }
    }

    fn members_conform(&self, schema: &Value, members: &Map<String, Value>) -> Result<(), String> {
        let most = schema["maxProperties"].as_u64().unwrap_or(u64::MAX);
        if members.len() as u64 > most {
            return Err("too many members".to_owned());
        }
        for name in strings(&schema["required"]) {
            if !members.contains_key(name) {
                return Err(format!("{name} is missing"));
            }
        }
        for (name, value) in members {
            let property = match &schema["properties"][name] {
                Value::Null => &schema["additionalProperties"],
                property => property,
            };
            match property {
                Value::Null | Value::Bool(true) => {}
                Value::Bool(false) => return Err(format!("{name} is unknown")),
                property => self
                    .conforms(property, value)
                    .map_err(|error| format!("{name}: {error}"))?,
            }
        }
        Ok(())
    }
}

fn in_range(schema: &Value, number: &serde_json::Number) -> Result<(), String> {
    let number = number.as_i128().unwrap_or(i128::MAX);
    let limit = |name: &str| schema[name].as_i64().map(i128::from);
    let least = limit("minimum").unwrap_or(i128::MIN);
    let most = limit("maximum").unwrap_or(i128::MAX);
    if (least..=most).contains(&number) {
        Ok(())
    } else {
        Err(format!("{number} is out of range"))
    }
}
