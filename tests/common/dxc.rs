//! Microsoft's compiler of HLSL, from its library for Linux: enough of its interfaces to compile a text.

use std::ffi::{OsStr, c_void};
use std::ptr;

use libloading::{Library, Symbol};

#[repr(C)]
struct Guid(u32, u16, u16, [u8; 8]);

const COMPILER_CLASS: Guid = Guid(0x73e2_2d93, 0xe6ce, 0x47f3, [0xb5, 0xbf, 0xf0, 0x66, 0x4f, 0x39, 0xc1, 0xb0]);
const COMPILER: Guid = Guid(0x228b_4687, 0x5a6a, 0x4730, [0x90, 0x0c, 0x97, 0x02, 0xb2, 0x20, 0x3f, 0x54]);
const RESULT: Guid = Guid(0x5834_6cda, 0xdde7, 0x4497, [0x94, 0x61, 0x6f, 0x87, 0xaf, 0x5e, 0x06, 0x59]);

const UTF8: u32 = 65001;

// Methods by their places in the tables of the interfaces: three of IUnknown and its two destructors, then its own.
const RELEASE: usize = 2;
const COMPILE: usize = 5;
const GET_STATUS: usize = 5;
const GET_RESULT: usize = 6;
const GET_ERRORS: usize = 7;
const BUFFER: usize = 5;
const SIZE: usize = 6;

#[repr(C)]
struct Source {
    text: *const u8,
    bytes: usize,
    encoding: u32,
}

/// An object of the library, released at the end.
struct Object(*mut *const *const c_void);

impl Object {
    /// The method at a place of its table.
    ///
    /// # Safety
    /// `F` is that method's type.
    unsafe fn method<F: Copy>(&self, place: usize) -> F {
        assert_eq!(size_of::<F>(), size_of::<*const c_void>());
        // SAFETY: an object begins with the pointer to its table of functions.
        unsafe { std::mem::transmute_copy(&*(*self.0).add(place)) }
    }

    /// What a method without arguments gives.
    fn get(&self, place: usize) -> Object {
        let mut found = ptr::null_mut();
        // SAFETY: the callers ask for methods of this type.
        let status = unsafe {
            self.method::<unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> i32>(place)(self.0.cast(), &mut found)
        };
        assert!(status >= 0 && !found.is_null(), "method {place} gives {status:#x}");
        Object(found.cast())
    }

    /// The bytes of a blob.
    fn bytes(&self) -> Vec<u8> {
        // SAFETY: both are methods of a blob, which holds that many bytes there until it is released.
        unsafe {
            let start = self.method::<unsafe extern "C" fn(*mut c_void) -> *const u8>(BUFFER)(self.0.cast());
            let size = self.method::<unsafe extern "C" fn(*mut c_void) -> usize>(SIZE)(self.0.cast());
            std::slice::from_raw_parts(start, if start.is_null() { 0 } else { size }).to_vec()
        }
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: a method of every object, called once.
        unsafe { self.method::<unsafe extern "C" fn(*mut c_void) -> u32>(RELEASE)(self.0.cast()) };
    }
}

type CreateInstance = unsafe extern "C" fn(*const Guid, *const Guid, *mut *mut c_void) -> i32;
type Compile = unsafe extern "C" fn(
    *mut c_void,
    *const Source,
    *const *const u32,
    u32,
    *mut c_void,
    *const Guid,
    *mut *mut c_void,
) -> i32;

/// The library.
pub struct Dxc(Library);

impl Dxc {
    pub fn open(path: &OsStr) -> Self {
        // SAFETY: Microsoft's library, whose initialisation has no demands.
        Dxc(unsafe { Library::new(path) }.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    /// DXIL of a text, or the errors. Each call has a compiler of its own, so threads may share the library.
    pub fn compile(&self, text: &str, arguments: &[&str]) -> Result<Vec<u8>, String> {
        // Characters have four bytes on Linux.
        let words: Vec<Vec<u32>> =
            arguments.iter().map(|word| word.chars().map(u32::from).chain([0]).collect()).collect();
        let words: Vec<*const u32> = words.iter().map(|word| word.as_ptr()).collect();
        let source = Source { text: text.as_ptr(), bytes: text.len(), encoding: UTF8 };
        let (mut compiler, mut result) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the functions have these types in dxcapi.h, and everything they read lives until they return.
        let result = unsafe {
            let create: Symbol<'_, CreateInstance> = self.0.get(b"DxcCreateInstance\0").unwrap();
            let status = create(&COMPILER_CLASS, &COMPILER, &mut compiler);
            assert!(status >= 0 && !compiler.is_null(), "no compiler: {status:#x}");
            let compiler = Object(compiler.cast());
            let compile: Compile = compiler.method(COMPILE);
            let (count, includes) = (words.len() as u32, ptr::null_mut());
            let status = compile(compiler.0.cast(), &source, words.as_ptr(), count, includes, &RESULT, &mut result);
            assert!(status >= 0 && !result.is_null(), "no result: {status:#x}");
            Object(result.cast())
        };
        let mut status = 0;
        // SAFETY: a method of a result, of this type.
        unsafe {
            result.method::<unsafe extern "C" fn(*mut c_void, *mut i32) -> i32>(GET_STATUS)(
                result.0.cast(),
                &mut status,
            )
        };
        if status < 0 {
            return Err(String::from_utf8_lossy(&result.get(GET_ERRORS).bytes()).into_owned());
        }
        Ok(result.get(GET_RESULT).bytes())
    }
}
