//! What browsers' WGSL compilers refuse and naga accepts.

/// Mixtures of operators that WGSL's grammar wants parentheses for, such as `a < b & c`: each as the expression it stands in.
pub fn mixed_operators(text: &str) -> Vec<String> {
    let text: String = text.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n").collect();
    let mut found = Vec::new();
    // Expressions that are still open, the innermost one last.
    let mut open = vec![Expression::default()];
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let token = next_token(rest);
        let here = open.last_mut().expect("the outermost expression");
        match token {
            "(" | "[" => open.push(Expression::default()),
            ")" | "]" => {
                let inner = open.pop().expect("an expression");
                found.extend(inner.mistake());
                let outer = open.last_mut().expect("brackets that match");
                outer.text.push_str("(..)");
                outer.after_operand = true;
            }
            "," | ";" | ":" | "{" | "}" | "->" | "=" | "+=" | "-=" | "*=" | "/=" | "%=" | "&=" | "|=" | "^="
            | "<<=" | ">>=" | "++" | "--" | "return" | "if" | "else" | "for" | "while" | "loop" | "case" | "switch" => {
                found.extend(std::mem::take(here).mistake());
            }
            _ => here.push(token),
        }
        rest = rest[token.len()..].trim_start();
    }
    found.extend(open.into_iter().filter_map(|expression| expression.mistake()));
    found
}

/// An operator, a name with the types in angle brackets that belong to it, or a number.
fn next_token(text: &str) -> &str {
    let word = text.find(|c: char| !c.is_alphanumeric() && !"_.@".contains(c)).unwrap_or(text.len());
    if word > 0 {
        const GENERIC: [&str; 10] =
            ["vec2", "vec3", "vec4", "array", "bitcast", "ptr", "atomic", "var", "coop_mat", "coopLoad"];
        let generic = GENERIC.iter().any(|name| text[..word].starts_with(name)) && text[word..].starts_with('<');
        if !generic {
            return &text[..word];
        }
        let mut depth = 0;
        for (at, c) in text.char_indices().skip(word) {
            depth += i32::from(c == '<') - i32::from(c == '>');
            if depth == 0 {
                return &text[..=at];
            }
        }
        return text;
    }
    const LONG: [&str; 20] = [
        "<<=", ">>=", "<<", ">>", "<=", ">=", "==", "!=", "&&", "||", "->", "+=", "-=", "*=", "/=", "%=", "&=", "|=",
        "^=", "++",
    ];
    let long = LONG.iter().chain(&["--"]).find(|operator| text.starts_with(**operator));
    &text[..long.map_or(text.chars().next().map_or(1, char::len_utf8), |operator| operator.len())]
}

/// One expression without what stands in brackets.
#[derive(Default)]
struct Expression {
    text: String,
    after_operand: bool,
    operators: Vec<String>,
}

impl Expression {
    fn push(&mut self, token: &str) {
        self.text.push_str(token);
        self.text.push(' ');
        let is_operator = !token.starts_with(|c: char| c.is_alphanumeric() || "_.@".contains(c));
        // Others are of one operand.
        if is_operator && self.after_operand {
            self.operators.push(token.into());
        }
        self.after_operand = !is_operator;
    }

    /// The whole, where the grammar has no place for it.
    fn mistake(self) -> Option<String> {
        let is = |among: &'static [&'static str]| move |operator: &String| among.contains(&operator.as_str());
        let (bits, logic) = (is(&["&", "|", "^"]), is(&["&&", "||"]));
        let (relations, shifts) = (is(&["<", ">", "<=", ">=", "==", "!="]), is(&["<<", ">>"]));
        let all = &self.operators;
        let first = all.first();
        let alike = all.iter().all(|operator| Some(operator) == first);
        let mut wrong = all.iter().any(bits) && !alike;
        // Short-circuit operators of one kind, between them one relation at most, of at most one shift or a sum to a side.
        let kinds: Vec<&String> = all.iter().filter(|operator| logic(operator)).collect();
        wrong |= kinds.windows(2).any(|pair| pair[0] != pair[1]);
        for part in all.split(logic) {
            wrong |= part.iter().filter(|operator| relations(operator)).count() > 1;
            wrong |= part.split(relations).any(|side| side.iter().any(shifts) && side.len() > 1);
        }
        wrong.then_some(self.text)
    }
}

#[test]
fn mixtures_are_found() {
    for wrong in [
        "return queries < vec4<u32>(u32(end - start)) & vec4<bool>(j < n);",
        "let x = a + b << 2u;",
        "let x = a << 2u << 1u;",
        "if (a < b == c) {",
        "if (a && b || c) {",
        "x = f(1, a | b & c);",
        "x[a & b + 1u] = 2;",
        "let x = a * 2u ^ b; // once",
    ] {
        assert_eq!(mixed_operators(wrong).len(), 1, "{wrong}");
    }
    for right in [
        "return (queries < vec4<u32>(u32(end - start))) & vec4<bool>(j < n);",
        "var<workgroup> words: array<u32, 12>; let x = bitcast<vec4<f32>>(a) * -b + c / d;",
        "atomicOr(&classes, kind << ((step + 1u) / 4u * 2u));",
        "if (a < b && c + 1u >= d && !e) { x |= y & z; } // a < b & c",
        "let t = ((((b & 0x7fu) + 0x7fu) | b) & 0x80u) >> 7u; for (var i = 0u; i < n; i += 1u) { }",
        "x = a << 2u == b + c * d;",
        "x = a ^ b ^ c;",
        "fn f(a: ptr<function, f32>) -> vec2<f32> { return -*a & ~b; }",
    ] {
        assert_eq!(mixed_operators(right), [""; 0], "{right}");
    }
}
