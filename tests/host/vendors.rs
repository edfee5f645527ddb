//! What Metal's compiler and those of Direct3D are known to refuse or to get wrong, looked for in every kernel without either of them; and
//! Microsoft's DXC, where `SINK_ATTENTION_DXC` names it. docs/testing.md lists the cases with their sources.

use std::collections::{BTreeMap, HashMap};

use naga::back::{hlsl, msl};
use naga::proc::TypeResolution;
use naga::valid::{FunctionInfo, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, ArraySize, Barrier, BinaryOperator, Binding, Block, BuiltIn, Expression, Function, FunctionArgument,
    Handle, Module, Scalar, ScalarKind, Statement, StorageAccess, Type, TypeInner,
};
use rayon::prelude::*;
use sink_attention::DType;
use sink_attention::plan::{Capabilities, Kernel, MicroKernel, OptionalOperands, Plan, Preference, Variant};
use sink_attention::testing::cases::texts;
use sink_attention::testing::operands::problem;
use sink_attention::testing::variants::cache_variants;
use sink_attention::{Axes, Options, SinkLogits};

use super::shaders::{on_elements, on_matrices, validated, variants};
use crate::common::dxc::Dxc;

/// Workgroup memory of Metal and of Direct3D 12.
const WORKGROUP_BYTES: u32 = 32 << 10;
/// Threads of a workgroup of both.
const THREADS: u32 = 1024;
/// Registers of FXC, each of four numbers; an element of a local array takes one.
const REGISTERS: u32 = 4096;
/// Elements of an array.
const ELEMENTS: u32 = 65_535;

/// Who refuses a text, or computes something else from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    /// Microsoft's older compiler, which wgpu takes where it finds no DXC.
    Fxc,
    Dxc,
    Metal,
    Both,
}

/// A known case: who, where it is reported, and what a text must not have.
type Case = (Where, &'static str, &'static str);

const COMPONENT: Case =
    (Where::Fxc, "wgpu#8334, wgpu#4436", "a store to a component whose index is no constant (X3500, X3511)");
const SWITCH: Case =
    (Where::Fxc, "wgpu#5656, wgpu#4516, wgpu#4485", "a switch within a loop or a switch (wrong, X8000, X3708)");
const BARRIER: Case =
    (Where::Both, "DXC#1306, wgpu#4566", "a barrier that not all threads reach (FXC: X3663, others: undefined)");
const RACE: Case = (Where::Fxc, "naga#1921", "a store of all threads to one place (X3694)");
const FROM_SHARED: Case = (Where::Fxc, "gpuweb#3691", "workgroupUniformLoad (X4026, internal errors)");
const TOO_MANY_REGISTERS: Case = (Where::Fxc, "X4505", "local arrays of more than 4096 elements");
const LONG_ARRAY: Case = (Where::Fxc, "wgpu#1712", "an array of more than 65535 elements");
const WIDTH: Case = (Where::Fxc, "naga#1884", "numbers that are not of 32 bits");
const SUBGROUP: Case = (Where::Fxc, "Shader Model 6.0", "operations of subgroups");
const MATRIX: Case = (Where::Both, "wgpu#8218", "matrices of columns");
const POINTER: Case = (Where::Dxc, "DXC#2768", "functions that take pointers");
const CAST: Case = (Where::Dxc, "wgpu#7648, DXC#7395", "a literal whose bits are another type's (DXC crashes)");
const ENDLESS: Case =
    (Where::Both, "wgpu#4972, wgpu#6528", "a loop that nothing leaves (Metal: undefined; FXC: X3696)");
const FAST_NAN: Case = (Where::Metal, "gpuweb#2270", "a number compared with itself, which fast math takes for equal");
const FAST_SUM: Case = (Where::Metal, "gpuweb#4562", "a sum less its own term, which fast math folds");
const MEMORY: Case = (Where::Both, "both specifications", "more than 32 KiB of workgroup memory, or than 1024 threads");

const CASES: [Case; 16] = [
    COMPONENT,
    SWITCH,
    BARRIER,
    RACE,
    FROM_SHARED,
    TOO_MANY_REGISTERS,
    LONG_ARRAY,
    WIDTH,
    SUBGROUP,
    MATRIX,
    POINTER,
    CAST,
    ENDLESS,
    FAST_NAN,
    FAST_SUM,
    MEMORY,
];

/// The cases that a module has.
struct Findings<'a> {
    module: &'a Module,
    found: Vec<Case>,
}

/// A function, while its statements are read.
struct Reader<'a> {
    function: &'a Function,
    info: &'a FunctionInfo,
    module: &'a Module,
    found: Vec<Case>,
}

fn findings(module: &Module, info: &ModuleInfo) -> Vec<Case> {
    let mut all = Findings { module, found: Vec::new() };
    all.types();
    let functions = module.functions.iter().map(|(handle, function)| (function, &info[handle]));
    let entries = module.entry_points.iter().enumerate().map(|(n, entry)| (&entry.function, info.get_entry_point(n)));
    for (function, info) in functions.chain(entries) {
        let mut reader = Reader { function, info, module, found: Vec::new() };
        reader.expressions();
        reader.block(&function.body, false);
        all.found.append(&mut reader.found);
    }
    all.found.extend(Uniformity::entry(module));
    all.found
}

/// Elements of a type, those of arrays within arrays, too.
fn elements(module: &Module, ty: Handle<Type>) -> u32 {
    match module.types[ty].inner {
        TypeInner::Array { base, size: ArraySize::Constant(size), .. } => {
            size.get().saturating_mul(elements(module, base))
        }
        _ => 1,
    }
}

impl Findings<'_> {
    fn types(&mut self) {
        let module = self.module;
        for (_, ty) in module.types.iter() {
            match ty.inner {
                TypeInner::Scalar(scalar) | TypeInner::Vector { scalar, .. } => {
                    // bool is of one byte here.
                    let is_32 = scalar.width == 4 || scalar.kind == ScalarKind::Bool;
                    self.found.extend((!is_32 && scalar.kind != ScalarKind::AbstractInt).then_some(WIDTH));
                }
                TypeInner::Matrix { .. } => self.found.push(MATRIX),
                TypeInner::Array { size: ArraySize::Constant(size), .. } if size.get() > ELEMENTS => {
                    self.found.push(LONG_ARRAY);
                }
                _ => {}
            }
        }
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let shared = module.global_variables.iter().filter(|(_, variable)| variable.space == AddressSpace::WorkGroup);
        let bytes: u32 = shared.map(|(_, variable)| layouter[variable.ty].size.next_multiple_of(16)).sum();
        let threads = module.entry_points.iter().map(|entry| entry.workgroup_size.iter().product()).max();
        if bytes > WORKGROUP_BYTES || threads > Some(THREADS) {
            self.found.push(MEMORY);
        }
    }
}

impl Reader<'_> {
    fn inner(&self, expression: Handle<Expression>) -> &TypeInner {
        match &self.info[expression].ty {
            TypeResolution::Handle(ty) => &self.module.types[*ty].inner,
            TypeResolution::Value(inner) => inner,
        }
    }

    fn expressions(&mut self) {
        for argument in &self.function.arguments {
            if self.module.types[argument.ty].inner.pointer_space().is_some() {
                self.found.push(POINTER);
            }
        }
        let registers = self.function.local_variables.iter().map(|(_, variable)| variable.ty);
        if registers.map(|ty| elements(self.module, ty)).fold(0, u32::saturating_add) > REGISTERS {
            self.found.push(TOO_MANY_REGISTERS);
        }
        let expressions = &self.function.expressions;
        for (_, expression) in expressions.iter() {
            match *expression {
                Expression::As { expr, convert: None, .. } if matches!(expressions[expr], Expression::Literal(_)) => {
                    self.found.push(CAST);
                }
                Expression::Binary { op: BinaryOperator::Equal | BinaryOperator::NotEqual, left, right }
                    if self.same(left, right, false) && self.is_float(left) =>
                {
                    self.found.push(FAST_NAN);
                }
                Expression::Binary { op: BinaryOperator::Subtract, left, right } if self.is_float(left) => {
                    let sum = |sum: Handle<Expression>, term| match expressions[sum] {
                        Expression::Binary { op: BinaryOperator::Add | BinaryOperator::Subtract, left, right } => {
                            self.same(left, term, true) || self.same(right, term, true)
                        }
                        _ => false,
                    };
                    if sum(left, right) || sum(right, left) {
                        self.found.push(FAST_SUM);
                    }
                }
                _ => {}
            }
        }
    }

    fn is_float(&self, expression: Handle<Expression>) -> bool {
        let scalar = self.inner(expression).scalar();
        scalar.is_some_and(|Scalar { kind, .. }| kind == ScalarKind::Float)
    }

    /// Whether two expressions are one; with `loads` also two loads of one place, whatever happens between them.
    fn same(&self, a: Handle<Expression>, b: Handle<Expression>, loads: bool) -> bool {
        let expressions = &self.function.expressions;
        match (&expressions[a], &expressions[b]) {
            _ if a == b => !matches!(expressions[a], Expression::Literal(_)),
            (Expression::Load { pointer: a }, Expression::Load { pointer: b }) => loads && self.same(*a, *b, loads),
            (Expression::AccessIndex { base: a, index: i }, Expression::AccessIndex { base: b, index: j }) => {
                i == j && self.same(*a, *b, loads)
            }
            _ => false,
        }
    }

    /// `within` a loop or a switch.
    fn block(&mut self, block: &Block, within: bool) {
        for statement in block.iter() {
            match statement {
                Statement::Block(block) => self.block(block, within),
                Statement::If { accept, reject, .. } => {
                    self.block(accept, within);
                    self.block(reject, within);
                }
                Statement::Switch { cases, .. } => {
                    self.found.extend(within.then_some(SWITCH));
                    cases.iter().for_each(|case| self.block(&case.body, true));
                }
                Statement::Loop { body, continuing, break_if } => {
                    if break_if.is_none() && !leaves(body) {
                        self.found.push(ENDLESS);
                    }
                    self.block(body, true);
                    self.block(continuing, true);
                }
                Statement::Store { pointer, .. } => self.store(*pointer),
                Statement::WorkGroupUniformLoad { .. } => self.found.push(FROM_SHARED),
                Statement::SubgroupBallot { .. }
                | Statement::SubgroupGather { .. }
                | Statement::SubgroupCollectiveOperation { .. } => self.found.push(SUBGROUP),
                _ => {}
            }
        }
    }

    fn store(&mut self, pointer: Handle<Expression>) {
        if let Expression::Access { base, .. } = self.function.expressions[pointer]
            && let TypeInner::Pointer { base: pointee, space: AddressSpace::Function | AddressSpace::Private } =
                self.inner(base)
            && matches!(self.module.types[*pointee].inner, TypeInner::Vector { .. } | TypeInner::Matrix { .. })
        {
            self.found.push(COMPONENT);
        }
    }
}

/// What differs between the threads of a workgroup, as FXC sees it: what comes from their numbers, or from memory that they write.
struct Uniformity<'a> {
    function: &'a Function,
    module: &'a Module,
    /// The arguments that differ.
    arguments: Vec<bool>,
    locals: Vec<bool>,
    results: HashMap<Handle<Expression>, bool>,
    /// Whether not all threads go on, after a return of some.
    returned: bool,
    /// Whether the result differs.
    result: bool,
    found: Vec<Case>,
}

impl<'a> Uniformity<'a> {
    fn of(module: &'a Module, function: &'a Function, arguments: Vec<bool>, varying: bool) -> Self {
        let locals = vec![false; function.local_variables.len()];
        let (results, found) = (HashMap::new(), Vec::new());
        let mut it = Uniformity { function, module, arguments, locals, results, returned: false, result: false, found };
        // Until a turn changes nothing: each only adds to what differs.
        loop {
            let before = (it.locals.clone(), it.results.clone(), it.result);
            it.found.clear();
            it.returned = varying;
            it.block(&function.body, &mut false);
            if before == (it.locals.clone(), it.results.clone(), it.result) {
                return it;
            }
        }
    }

    fn entry(module: &'a Module) -> Vec<Case> {
        let entry = &module.entry_points[0].function;
        let varies = |argument: &FunctionArgument| {
            !matches!(
                argument.binding,
                Some(Binding::BuiltIn(BuiltIn::WorkGroupId | BuiltIn::NumWorkGroups | BuiltIn::WorkGroupSize))
            )
        };
        Self::of(module, entry, entry.arguments.iter().map(varies).collect(), false).found
    }

    fn root(&self, mut pointer: Handle<Expression>) -> (Handle<Expression>, bool) {
        let mut varies = false;
        loop {
            match self.function.expressions[pointer] {
                Expression::Access { base, index } => {
                    varies |= self.varies(index);
                    pointer = base;
                }
                Expression::AccessIndex { base, .. } => pointer = base,
                _ => return (pointer, varies),
            }
        }
    }

    fn varies(&self, expression: Handle<Expression>) -> bool {
        let any = |all: &[Handle<Expression>]| all.iter().any(|expression| self.varies(*expression));
        match self.function.expressions[expression] {
            Expression::Literal(_)
            | Expression::Constant(_)
            | Expression::Override(_)
            | Expression::ZeroValue(_)
            | Expression::GlobalVariable(_)
            | Expression::LocalVariable(_)
            | Expression::WorkGroupUniformLoadResult { .. }
            | Expression::ArrayLength(_) => false,
            Expression::FunctionArgument(n) => self.arguments[n as usize],
            Expression::Compose { ref components, .. } => any(components),
            Expression::Access { base, index } => any(&[base, index]),
            Expression::AccessIndex { base: value, .. }
            | Expression::Splat { value, .. }
            | Expression::Swizzle { vector: value, .. }
            | Expression::Unary { expr: value, .. }
            | Expression::Relational { argument: value, .. }
            | Expression::As { expr: value, .. } => self.varies(value),
            Expression::Binary { left, right, .. } => any(&[left, right]),
            Expression::Select { condition, accept, reject } => any(&[condition, accept, reject]),
            Expression::Math { arg, arg1, arg2, arg3, .. } => {
                self.varies(arg) || [arg1, arg2, arg3].into_iter().flatten().any(|argument| self.varies(argument))
            }
            Expression::Load { pointer } => {
                let (root, varies) = self.root(pointer);
                varies
                    || match self.function.expressions[root] {
                        Expression::LocalVariable(variable) => self.locals[variable.index()],
                        Expression::GlobalVariable(variable) => match self.module.global_variables[variable].space {
                            AddressSpace::Uniform => false,
                            AddressSpace::Storage { access } => access.contains(StorageAccess::STORE),
                            _ => true,
                        },
                        _ => true,
                    }
            }
            Expression::CallResult(_) => self.results.get(&expression).copied().unwrap_or(false),
            _ => true,
        }
    }

    /// `left` tells that some threads have left the loop, or this turn of it.
    fn block(&mut self, block: &Block, left: &mut bool) {
        for statement in block.iter() {
            let varying = self.returned || *left;
            match *statement {
                Statement::Block(ref block) => self.block(block, left),
                Statement::If { condition, ref accept, ref reject } => {
                    let differs = self.varies(condition);
                    for block in [accept, reject] {
                        self.branch(block, differs, left);
                    }
                }
                Statement::Switch { selector, ref cases } => {
                    let differs = self.varies(selector);
                    for case in cases {
                        // A break leaves the switch, where all meet again.
                        let mut inside = *left || differs;
                        self.branch(&case.body, differs, &mut inside);
                    }
                }
                Statement::Loop { ref body, ref continuing, break_if } => {
                    // Whoever leaves is missing in the next turn, but all meet behind the loop.
                    let mut inside = *left || break_if.is_some_and(|condition| self.varies(condition));
                    for _ in 0..2 {
                        self.block(body, &mut inside);
                        self.block(continuing, &mut inside);
                    }
                }
                Statement::Return { value } => {
                    self.result |= varying || value.is_some_and(|value| self.varies(value));
                }
                // A subgroup's barrier is for the threads of the subgroup, whatever the others do.
                Statement::ControlBarrier(barrier) => {
                    let all = barrier != Barrier::SUB_GROUP;
                    self.found.extend((varying && all).then_some(BARRIER));
                }
                Statement::WorkGroupUniformLoad { .. } => self.found.extend(varying.then_some(BARRIER)),
                Statement::Store { pointer, value } => {
                    let (root, index) = self.root(pointer);
                    match self.function.expressions[root] {
                        Expression::LocalVariable(variable) => {
                            self.locals[variable.index()] |= varying || index || self.varies(value);
                        }
                        Expression::GlobalVariable(variable) => {
                            let space = self.module.global_variables[variable].space;
                            let shared = matches!(space, AddressSpace::WorkGroup | AddressSpace::Storage { .. });
                            self.found.extend((shared && !varying && !index).then_some(RACE));
                        }
                        _ => {}
                    }
                }
                Statement::Call { function, ref arguments, result } => {
                    let arguments = arguments.iter().map(|argument| self.varies(*argument)).collect();
                    let called = Uniformity::of(self.module, &self.module.functions[function], arguments, varying);
                    // One thread's branch may call, so a callee's stores are judged by where they are called.
                    self.found.extend(called.found);
                    if let Some(result) = result {
                        *self.results.entry(result).or_default() |= called.result;
                    }
                }
                _ => {}
            }
        }
    }

    fn branch(&mut self, block: &Block, differs: bool, left: &mut bool) {
        let (returned, was_left) = (self.returned, *left);
        let mut inside = was_left || differs;
        self.block(block, &mut inside);
        let varying = returned || was_left || differs;
        let (returns, leaves) = (returns(block), leaves_loop(block));
        self.returned = returned || (varying && returns);
        *left = was_left || (varying && leaves);
    }
}

/// Whether a block leaves the loop around it, or this turn of it.
fn leaves_loop(block: &Block) -> bool {
    block.iter().any(|statement| match statement {
        Statement::Break | Statement::Continue => true,
        Statement::Block(block) => leaves_loop(block),
        Statement::If { accept, reject, .. } => leaves_loop(accept) || leaves_loop(reject),
        _ => false,
    })
}

/// Whether a loop's body has a way out.
fn leaves(block: &Block) -> bool {
    block.iter().any(|statement| match statement {
        Statement::Break | Statement::Return { .. } => true,
        Statement::Block(block) => leaves(block),
        Statement::If { accept, reject, .. } => leaves(accept) || leaves(reject),
        // A break leaves the switch alone.
        Statement::Switch { cases, .. } => cases.iter().any(|case| returns(&case.body)),
        _ => false,
    })
}

fn returns(block: &Block) -> bool {
    block.iter().any(|statement| match statement {
        Statement::Return { .. } => true,
        Statement::Block(block) => returns(block),
        Statement::If { accept, reject, .. } => returns(accept) || returns(reject),
        Statement::Loop { body, continuing, .. } => returns(body) || returns(continuing),
        Statement::Switch { cases, .. } => cases.iter().any(|case| returns(&case.body)),
        _ => false,
    })
}

/// Whether it runs on devices with matrices alone, of which Metal's are some, and Direct3D's none.
fn beside_matrices(variant: &Variant) -> bool {
    on_matrices(variant) || variant.fallback.is_some()
}

/// Every kernel that reaches Metal's or Direct3D's compiler.
fn kernels() -> Vec<Variant> {
    let sixteen = |variant: &Variant| variant.matrices.is_some_and(|matrices| matrices.side != 8);
    let caches = cache_variants().into_iter().map(|(variant, _)| variant);
    let all = variants().into_iter().chain(caches);
    // What computes on elements reaches drivers as SPIR-V alone, Metal's matrices are 8x8, and neither has as much memory as some devices.
    let fits = |variant: &Variant| variant.workgroup_bytes() <= WORKGROUP_BYTES && variant.threads() <= THREADS;
    all.filter(|variant| !(on_elements(variant) || sixteen(variant)) && fits(variant)).collect()
}

#[test]
fn no_kernel_has_a_known_case() {
    let kernels = texts(kernels());
    assert!(kernels.iter().any(on_matrices) && kernels.iter().any(|variant| variant.kernel == Kernel::DECODE));
    let found: BTreeMap<String, Vec<String>> = kernels
        .par_iter()
        .flat_map_iter(|variant| {
            let (module, info) = validated(variant);
            let name = variant.name();
            let found = findings(&module, &info).into_iter();
            let own = found.filter(|case| match *case {
                // Their loops end by flags that all threads read from workgroup memory, which the text does not show.
                BARRIER => !on_matrices(variant),
                // The kernels that sum over rows compensate rounding errors. Fast math may take the compensation away, and then these are
                // plain sums: docs/precision.md.
                FAST_SUM => variant.tiling.is_some(),
                (Where::Metal | Where::Both, ..) => true,
                (Where::Fxc | Where::Dxc, ..) => !beside_matrices(variant),
            });
            own.map(move |case| (format!("{case:?}"), name.clone())).collect::<Vec<_>>()
        })
        .fold(BTreeMap::new, |mut all: BTreeMap<String, Vec<String>>, (case, name)| {
            all.entry(case).or_default().push(name);
            all
        })
        .reduce(BTreeMap::new, |mut all, some| {
            some.into_iter().for_each(|(case, names)| all.entry(case).or_default().extend(names));
            all
        });
    let found: Vec<_> = found.iter().map(|(case, names)| (case, names.len(), &names[..names.len().min(5)])).collect();
    assert!(found.is_empty(), "{found:#?}");
}

fn parsed(text: &str, flags: ValidationFlags) -> Option<(Module, ModuleInfo)> {
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|error| panic!("{}", error.emit_to_string(text)));
    let info = Validator::new(flags, naga::valid::Capabilities::all()).validate(&module).ok()?;
    Some((module, info))
}

/// A check that cannot fail proves nothing: each case has a text that has it, beside one that nearly has.
#[test]
fn each_case_is_found() {
    let kernel = |body: &str| {
        format!(
            "@group(0) @binding(0) var<storage, read_write> data: array<f32>;
             var<workgroup> shared_data: array<f32, 64>;
             fn f(x: f32) -> f32 {{ return x; }}
             @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) thread: u32) {{ {body} }}"
        )
    };
    let texts = [
        (
            COMPONENT,
            kernel("var v = vec4<f32>(); v[thread % 4u] = 1.0; data[thread] = v.x;"),
            kernel("var v: array<f32, 4>; v[thread % 4u] = 1.0; data[thread] = v[0];"),
        ),
        (
            SWITCH,
            kernel("for (var i = 0u; i < thread; i++) { switch i { case 3u: { data[thread] = 1.0; } default: {} } }"),
            kernel("switch thread { case 3u: { data[thread] = 1.0; } default: {} }"),
        ),
        (
            BARRIER,
            kernel("for (var i = 0u; i < 9u; i++) { if (data[i] > 1.0) { break; } workgroupBarrier(); }"),
            kernel("for (var i = 0u; i < 9u; i++) { if (i > 3u) { break; } workgroupBarrier(); }"),
        ),
        (RACE, kernel("shared_data[3] = 1.0;"), kernel("if (thread == 0u) { shared_data[3] = 1.0; }")),
        (
            FROM_SHARED,
            kernel("if (workgroupUniformLoad(&shared_data[0]) > 1.0) { data[thread] = 1.0; }"),
            kernel("if (shared_data[0] > 1.0) { data[thread] = 1.0; }"),
        ),
        (
            TOO_MANY_REGISTERS,
            kernel("var v: array<f32, 5000>; v[thread] = 1.0; data[thread] = v[1];"),
            kernel("var v: array<f32, 4096>; v[thread] = 1.0; data[thread] = v[1];"),
        ),
        (
            LONG_ARRAY,
            "var<private> v: array<f32, 70000>; @compute @workgroup_size(1) fn main() { v[0] = 1.0; }".into(),
            "var<private> v: array<f32, 65535>; @compute @workgroup_size(1) fn main() { v[0] = 1.0; }".into(),
        ),
        (
            WIDTH,
            "enable f16; @compute @workgroup_size(1) fn main() { var v = 1h; v = v + v; }".into(),
            "@compute @workgroup_size(1) fn main() { var v = true; v = !v; }".into(),
        ),
        (
            SUBGROUP,
            kernel("data[thread] = subgroupAdd(f32(thread));"),
            kernel("data[thread] = f32(thread);"),
        ),
        (
            MATRIX,
            "@group(0) @binding(0) var<uniform> m: mat4x4<f32>; @compute @workgroup_size(1) fn main() { let v = m[0]; }"
                .into(),
            "@group(0) @binding(0) var<uniform> m: vec4<f32>; @compute @workgroup_size(1) fn main() { let v = m[0]; }"
                .into(),
        ),
        (
            POINTER,
            "fn g(x: ptr<function, f32>) { *x = 1.0; } @compute @workgroup_size(1) fn main() { var v = 0.0; g(&v); }"
                .into(),
            "fn g(x: f32) -> f32 { return x; } @compute @workgroup_size(1) fn main() { let v = g(1.0); }".into(),
        ),
        (
            CAST,
            kernel("var one = 1u; data[thread] = bitcast<f32>(0x7f800000u);"),
            kernel("var one = 1u; data[thread] = bitcast<f32>(one);"),
        ),
        (
            ENDLESS,
            kernel("loop { data[thread] += 1.0; }"),
            kernel("loop { data[thread] += 1.0; if (data[thread] > 9.0) { break; } }"),
        ),
        (
            FAST_NAN,
            kernel("let x = data[thread]; if (x != x) { data[thread] = 0.0; }"),
            kernel("let x = data[thread]; if (x != 1.0) { data[thread] = 0.0; }"),
        ),
        (
            FAST_SUM,
            kernel("let a = data[thread]; let b = data[2]; let s = a + b; data[thread] = s - a;"),
            kernel("let a = data[thread]; let b = data[2]; let s = a + b; data[thread] = s - data[3];"),
        ),
        (
            MEMORY,
            "var<workgroup> v: array<f32, 8193>; @compute @workgroup_size(1) fn main() { v[0] = 1.0; }".into(),
            "var<workgroup> v: array<f32, 8192>; @compute @workgroup_size(1) fn main() { v[0] = 1.0; }".into(),
        ),
    ];
    assert_eq!(texts.each_ref().map(|(case, ..)| *case), CASES);
    for (case, bad, good) in texts {
        for (text, expected) in [(bad, true), (good, false)] {
            let (module, info) = parsed(&text, ValidationFlags::all()).expect(&text);
            let found = findings(&module, &info);
            assert_eq!(found.contains(&case), expected, "{case:?}: {found:?} in {text}");
        }
    }
    // naga's validation takes the first for right.
    for (barrier, expected) in [
        ("if (thread > 3u) { workgroupBarrier(); }", true),
        ("if (f(f32(thread)) > 3.0) { return; } workgroupBarrier();", true),
        ("var x = 1u; if (thread > 3u) { x = 2u; } while (x > 1u) { workgroupBarrier(); x -= 1u; }", true),
        ("if (f(3.0) > 3.0) { return; } workgroupBarrier();", false),
        ("for (var i = thread; i < 9u; i++) { data[i] = 1.0; } workgroupBarrier();", false),
    ] {
        let text = kernel(barrier);
        let (module, info) = parsed(&text, ValidationFlags::all()).expect(&text);
        assert_eq!(findings(&module, &info).contains(&BARRIER), expected, "{text}");
    }
    // Numbers that are infinite are refused.
    assert!(naga::front::wgsl::parse_str("const x = 1e39f;").is_err());
}

/// Plans stay within what Metal and Direct3D 12 give a workgroup, on every device that has no more; and on Apple's, within a quarter of the
/// threads, because a kernel that needs many registers gets no more (`maxTotalThreadsPerThreadgroup`).
#[test]
fn plans_fit_metal_and_direct3d() {
    let samples = Capabilities::samples();
    let small: Vec<_> = samples.iter().filter(|device| device.workgroup_bytes <= WORKGROUP_BYTES).collect();
    assert!(small.iter().any(|device| device.name.contains("Apple")), "no sample of Apple's");
    let options = [
        Options::new(),
        Options::new().causal(true).sink_logits(SinkLogits::PerHead).softcap(1.0),
        Options::new().bias(Axes::KEYS),
    ];
    let mut most = 0;
    for device in small {
        for options in options {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                for width in [1, 16, 33, 64, 80, 128, 192, 256, 512] {
                    for seq in [1, 33, 100, 4096] {
                        let problem = problem([1, 2, 1], [seq, seq], [width, width], options.dtype(dtype));
                        for micro_kernel in [MicroKernel::Portable, MicroKernel::Cooperative] {
                            let preference = Preference::default().micro_kernel(micro_kernel);
                            for plan in [Plan::forward_with, Plan::backward_with] {
                                let plan = plan(&problem, OptionalOperands::default(), device, &preference);
                                for pass in plan.into_iter().flat_map(|plan| plan.passes) {
                                    let (bytes, threads) = (pass.variant.workgroup_bytes(), pass.variant.threads());
                                    let what = || format!("{}: {}", device.name, pass.variant.name());
                                    assert!(bytes <= WORKGROUP_BYTES, "{bytes} bytes of {}", what());
                                    assert!(threads <= 256, "{threads} threads of {}", what());
                                    most = most.max(bytes);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    // They use what there is.
    assert!(most > WORKGROUP_BYTES / 2, "{most}");
}

/// HLSL as wgpu writes it for kernels of this crate, without checks at run time.
fn hlsl(module: &Module, info: &ModuleInfo, shader_model: hlsl::ShaderModel) -> String {
    let options = hlsl::Options {
        shader_model,
        special_constants_binding: Some(hlsl::BindTarget { register: 0, space: 1, ..Default::default() }),
        zero_initialize_workgroup_memory: false,
        restrict_indexing: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default()).write(module, info, None).unwrap();
    text
}

/// DXIL of a text, or DXC's errors, as wgpu asks for it.
fn dxil(dxc: &Dxc, text: &str) -> Result<Vec<u8>, String> {
    dxc.compile(text, &["-E", "main", "-T", "cs_6_0", "-HV", "2018", "-no-warnings", "-Ges"])
}

/// Every kernel that Direct3D 12 gets, by Microsoft's compiler. Needs `SINK_ATTENTION_DXC`, the path of libdxcompiler.so, which
/// `tests/dxc.sh` prints.
#[test]
fn dxc_compiles_every_kernel() {
    let Some(path) = std::env::var_os("SINK_ATTENTION_DXC") else {
        println!("not run: SINK_ATTENTION_DXC names no libdxcompiler.so; tests/dxc.sh installs one");
        return;
    };
    let dxc = Dxc::open(&path);
    // It can fail.
    let wrong = "[numthreads(1, 1, 1)] void main() { float x = nothing; }";
    assert!(dxil(&dxc, wrong).unwrap_err().contains("nothing"));
    let greedy = "groupshared float x[9000]; RWByteAddressBuffer b : register(u0); [numthreads(64, 1, 1)]
        void main(uint t : SV_GroupIndex) { x[t * 70] = t; b.Store(0, asuint(x[7 * t])); }";
    assert!(dxil(&dxc, greedy).is_err(), "36000 bytes of workgroup memory");

    let kernels = texts(kernels().into_iter().filter(|variant| !beside_matrices(variant)));
    let compiled: Vec<usize> = kernels
        .par_iter()
        .map(|variant| {
            let (module, info) = validated(variant);
            let text = hlsl(&module, &info, hlsl::ShaderModel::V6_0);
            let bytes = dxil(&dxc, &text).unwrap_or_else(|error| panic!("{}: {error}\n{text}", variant.name()));
            assert_eq!(bytes[..4], *b"DXBC", "{}", variant.name());
            bytes.len()
        })
        .collect();
    println!("DXC compiled {} kernels, {} bytes of DXIL", compiled.len(), compiled.iter().sum::<usize>());
}

/// FXC gets Shader Model 5.1, and Metal no more than 2.4 where there are no matrices; naga writes both.
#[test]
fn older_languages_can_be_written() {
    texts(kernels()).par_iter().for_each(|variant| {
        let (module, info) = validated(variant);
        let options = msl::Options { lang_version: (2, 4), ..Default::default() };
        let (text, _) = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).unwrap();
        assert!(text.contains("kernel void"), "{}", variant.name());
        if !on_matrices(variant) {
            let text = hlsl(&module, &info, hlsl::ShaderModel::V5_1);
            assert!(!text.contains("while(true)") || text.contains("break;"), "{}", variant.name());
        }
    });
}
